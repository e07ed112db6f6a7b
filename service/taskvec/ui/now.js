// Now: the work of the service, from /metrics, while this view is in sight.

import { drawLine } from "./charts.js";
import { readMetrics } from "./client.js";
import { byId, element, number, showProblem } from "./elements.js";
import { growth, mean, parse, quantile, total } from "./metrics.js";

const SECONDS = 2;
const PLACES = 60;

const rate = (name) => (before, after, seconds) => {
  const grown = growth(before, after, name);
  return grown === null ? null : grown / seconds;
};
const gauge = (name) => (_, after) => total(after, name);
const milliseconds = (share) => (before, after) => {
  const value = quantile(before, after, "taskvec_request_seconds", share);
  return value === null ? null : value * 1000;
};

const FIGURES = [
  { name: "Requests", unit: "a second", digits: 1, value: rate("taskvec_requests_total") },
  { name: "Tokens", unit: "a second", digits: 0, value: rate("taskvec_tokens_total") },
  { name: "Median latency", unit: "ms", digits: 1, value: milliseconds(0.5) },
  { name: "95th percentile of latency", unit: "ms", digits: 1, value: milliseconds(0.95) },
  { name: "Requests in flight", unit: "", digits: 0, value: gauge("taskvec_requests_in_flight") },
  { name: "Queue", unit: "tokens", digits: 0, value: gauge("taskvec_queue_tokens") },
  {
    name: "Batch fill", unit: "% of the token budget", digits: 1,
    value: (before, after) => {
      const fill = mean(before, after, "taskvec_batch_fill_ratio");
      return fill === null ? null : 100 * fill;
    },
  },
  { name: "Errors of any kind", unit: "a second", digits: 1, value: rate("taskvec_rejected_total") },
];

/** Returns { show, hide }: the metrics are read only between the two. */
export function startNow() {
  const figures = FIGURES.map((figure) => {
    const value = element("span", {}, "–");
    const canvas = element("canvas", { role: "img", "aria-label": `${figure.name}: no value yet` });
    byId("now-figures").append(element("div", {},
      element("dt", {}, figure.name),
      element("dd", {}, element("p", { class: "value" }, value, " ", element("span", { class: "unit" }, figure.unit)), canvas)));
    return { ...figure, shown: value, canvas, history: [] };
  });

  let before = null, timer = null, reading = null;

  async function read() {
    reading = new AbortController();
    try {
      const scrape = { at: performance.now(), series: parse(await readMetrics(reading.signal)) };
      if (!scrape.series.taskvec_requests_total) {
        throw new Error("What answers at /metrics here is not this service's metrics.");
      }
      if (before) update(before, scrape);
      byId("now-status").textContent = "";
      showProblem("now-problem");
      before = scrape;
    } catch (error) {
      if (error.name === "AbortError") return;
      before = null;
      byId("now-status").textContent = "";
      showProblem("now-problem", { message: explained(error) });
    }
    if (timer !== null) timer = setTimeout(read, SECONDS * 1000);
  }

  function update(first, second) {
    const seconds = (second.at - first.at) / 1000;
    for (const figure of figures) {
      const value = figure.value(first.series, second.series, seconds);
      figure.history = [...figure.history, value].slice(-PLACES);
      figure.shown.textContent = value === null ? "–" : number(value, value >= 1000 ? 0 : figure.digits);
      const known = figure.history.filter((each) => each !== null);
      figure.canvas.setAttribute("aria-label", known.length
        ? `${figure.name} in the last ${figure.history.length * SECONDS} seconds: ${number(Math.min(...known), figure.digits)} to ${number(Math.max(...known), figure.digits)}`
        : `${figure.name}: no requests`);
    }
    draw();
  }

  function draw() {
    for (const { canvas, history } of figures) drawLine(canvas, history, PLACES);
  }

  new ResizeObserver(draw).observe(byId("now-figures"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

  let wanted = false;
  function follow() {
    const visible = wanted && document.visibilityState === "visible";
    if (visible && timer === null) {
      timer = 0;
      byId("now-status").textContent = before ? "" : "Reading…";
      read();
    } else if (!visible && timer !== null) {
      clearTimeout(timer);
      timer = null;
      reading?.abort();
      before = null; // what happened meanwhile is not the last two seconds
    }
  }
  document.addEventListener("visibilitychange", follow);
  addEventListener("key-changed", () => {
    if (timer === null) return;
    clearTimeout(timer);
    reading?.abort();
    read();
  });
  return {
    show() { wanted = true; follow(); },
    hide() { wanted = false; follow(); },
  };
}

function explained(error) {
  if (error.status === 401) return `${error.message} /metrics needs one here: give it above.`;
  if (error.status === 404) return "There is no /metrics at this address: the operator serves it elsewhere, such as on another port, or not at all.";
  return error.message;
}
