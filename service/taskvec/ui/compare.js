// Compare: the same texts under several tasks, as heat maps of similarities and as maps.

import { cellAt, colour, drawHeatMap, drawMap, pointAt } from "./charts.js";
import { embed, embeddingBody } from "./client.js";
import { announce, byId, element, latest, linesOf, number, plural, renamed, showProblem, submitByKey } from "./elements.js";
import { repeated } from "./retry.js";
import { COMPARE } from "./samples.js";
import { aligned, principalComponents, similarityMatrix } from "./vectors.js";

const FEWEST_TEXTS = 2;
const FEWEST_ON_A_MAP = 3; // two are always at both ends of it
const MOST_TEXTS = 200;
const TASKS_AT_FIRST = 4;
const COLOURS = 6;

const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

export function startCompare(model) {
  byId("compare-texts").value ||= COMPARE.join("\n");
  const first = tasksAtFirst(model.tasks);
  byId("compare-tasks").replaceChildren(...model.tasks.map((task) =>
    element("label", {},
      element("input", { type: "checkbox", name: "compare-task", value: task, checked: first.includes(task) }), task)));

  let shown = null; // what the panels show: texts, panels and the selected pair

  const run = latest(async ({ signal, isLatest }, { again = false, byHand = false } = {}) => {
    outcome();
    if (!again) showProblem("compare-problem");
    const lines = linesOf(byId("compare-texts").value);
    const texts = lines.map(({ text }) => text);
    const tasks = [...document.querySelectorAll("input[name=compare-task]:checked")].map((box) => box.value);
    const problem = problemWith(texts, tasks);
    if (problem) {
      clear();
      showProblem("compare-problem", { message: problem });
      return;
    }
    if (!again) byId("compare-status").textContent = "Embedding…";
    byId("compare-progress").hidden = again;
    try {
      const input = tasks.flatMap((task) => texts.map((text) => ({ text, task })));
      const body = embeddingBody({ model, input, dimensions: model.dimensions, type: "float" });
      const answer = await embed(body, signal);
      if (!isLatest()) return;
      clear();
      showProblem("compare-problem");
      shown = { texts, panels: panelsOf(tasks, texts.length, answer.vectors), selected: null };
      byId("compare-status").textContent =
        `${plural(texts.length, "text")}, ${plural(tasks.length, "task")}, one request: ` +
        `${plural(answer.tokens, "token")} in ${number(answer.milliseconds)} ms.`;
      byId("compare-readout").replaceChildren(
        hint("Rows and columns are the texts in their order. A similarity of 1 has the full colour."),
        hint("Point at a square or a dot to read its texts, or move through a heat map with the arrow keys.", "for-keys"),
        hint("Touch a square or a dot to read its texts.", "for-touch"));
      build();
      if (byHand) goTo(byId("compare-result"));
    } catch (error) {
      if (!isLatest()) return;
      clear();
      showProblem("compare-problem", renamed(error, (index) => `line ${lines[index % lines.length].line}`));
      outcome(error);
    }
  });
  const outcome = repeated(byId("view-compare"), run);

  /** Remove what an earlier request has shown. */
  function clear() {
    shown = null;
    byId("compare-status").textContent = "";
    for (const id of ["compare-readout", "compare-panels"]) byId(id).replaceChildren();
    for (const id of ["compare-result", "compare-table", "compare-progress"]) byId(id).hidden = true;
  }

  function build() {
    byId("compare-result").hidden = false;
    byId("compare-panels").replaceChildren(...shown.panels.map((panel) => {
      panel.heat = element("canvas", {
        class: "heat", tabindex: "0", role: "application", "aria-roledescription": "heat map",
        "aria-label": `${panel.task}: similarities of all pairs, ${inWords(panel)}. Arrow keys move from pair to pair.`,
      });
      const n = shown.texts.length;
      const point = (event) => select(cellAt(panel.heat, n, event));
      panel.heat.addEventListener("pointermove", point);
      panel.heat.addEventListener("pointerdown", point);
      panel.heat.addEventListener("keydown", (event) => {
        const arrow = ARROWS[event.key];
        if (!arrow) return;
        event.preventDefault();
        const [i, j] = shown.selected ?? [1, 1];
        select([i + arrow[0], j + arrow[1]].map((at) => (at + n) % n), panel);
      });
      return element("section", { class: `mark-${panel.number}`, "aria-label": panel.task },
        element("h2", {}, panel.task),
        panel.heat,
        element("p", { class: "range" }, `Similarity ${inWords(panel)}`),
        ...(n < FEWEST_ON_A_MAP ? [] : mapOf(panel)));
    }));
    draw();
    showTable();
  }

  function mapOf(panel) {
    panel.map = element("canvas", {
      class: "map", role: "img",
      "aria-label": `${panel.task}: the texts on a map. The table below has the nearest text of each.`,
    });
    const nearest = (event) => {
      const i = pointAt(panel.map, panel.points, event);
      select([i, panel.nearest[i]]);
    };
    panel.map.addEventListener("pointermove", nearest);
    panel.map.addEventListener("pointerdown", nearest);
    return [panel.map, element("p", { class: "range" }, `Two components, ${number(100 * panel.explained)} % of the variance`)];
  }

  function draw() {
    for (const panel of shown?.panels ?? []) {
      const full = colour(`--task-${panel.number}`);
      drawHeatMap(panel.heat, { ...panel, largest: 1, n: shown.texts.length, full, selected: shown.selected });
      if (panel.map) drawMap(panel.map, { ...panel, full, selected: shown.selected });
    }
  }

  function select([i, j], byKeyIn = null) {
    if (shown.selected?.[0] === i && shown.selected?.[1] === j) return;
    shown.selected = [i, j];
    draw();
    const { texts, panels } = shown, n = texts.length;
    const values = panels.map(({ task, matrix }) => `${task} ${number(matrix[i * n + j], 2)}`).join(", ");
    const pair = (i === j ? [i] : [i, j]).map((at) => element("span", {}, ...numbered(at, texts)));
    byId("compare-readout").replaceChildren(...pair, element("span", { class: "hint" }, values));
    if (byKeyIn) announce(`${i + 1} and ${j + 1}: ${number(byKeyIn.matrix[i * n + j], 2)}`);
  }

  function showTable() {
    const { texts, panels } = shown;
    const head = element("tr", {}, element("th", { scope: "col" }, "Text"),
      ...panels.map(({ task }) => element("th", { scope: "col" }, task)));
    const rows = texts.map((_, i) => element("tr", {},
      element("th", { scope: "row" }, ...numbered(i, texts)),
      ...panels.map(({ matrix, nearest }) => element("td", {},
        ...numbered(nearest[i], texts), ` (${number(matrix[i * texts.length + nearest[i]], 2)})`))));
    byId("compare-table").querySelector("table").replaceChildren(
      element("caption", { class: "hidden" }, "The nearest text of each text, with its similarity, by task"),
      element("thead", {}, head), element("tbody", {}, ...rows));
    byId("compare-table").hidden = false;
  }

  byId("compare-form").addEventListener("submit", (event) => {
    event.preventDefault();
    run({ byHand: true });
  });
  submitByKey(byId("compare-form"));
  byId("compare-sample").addEventListener("click", () => {
    byId("compare-texts").value = COMPARE.join("\n");
    run({ byHand: true });
  });
  new ResizeObserver(draw).observe(byId("compare-panels"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  run();
}

/** Four tasks that differ: of a pair for queries and passages, only the passages. */
function tasksAtFirst(tasks) {
  const others = tasks.filter((task) => !(task.endsWith(".query") && tasks.includes(task.replace(/query$/, "passage"))));
  return others.slice(0, TASKS_AT_FIRST);
}

function problemWith(texts, tasks) {
  if (!tasks.length) return "Choose a task.";
  if (texts.length < FEWEST_TEXTS) return "Write at least two texts, one a line.";
  if (texts.length > MOST_TEXTS) return `There are ${texts.length} texts, but this page compares ${MOST_TEXTS} at most.`;
  return null;
}

function panelsOf(tasks, n, vectors) {
  const panels = tasks.map((task, t) => {
    const own = vectors.slice(t * n, (t + 1) * n);
    const matrix = similarityMatrix(own);
    const { points, explained } = principalComponents(own);
    return { task, number: t % COLOURS, matrix, points, explained, ...rangeOf(matrix, n), nearest: nearestOf(matrix, n) };
  });
  for (const panel of panels.slice(1)) panel.points = aligned(panel.points, panels[0].points);
  return panels;
}

/** The least and the largest similarity of two texts; the diagonal is always 1. */
function rangeOf(matrix, n) {
  let least = Infinity, largest = -Infinity;
  for (let i = 0; i < n; i++) {
    for (let j = 0; j < i; j++) {
      least = Math.min(least, matrix[i * n + j]);
      largest = Math.max(largest, matrix[i * n + j]);
    }
  }
  return { least, largest };
}

function nearestOf(matrix, n) {
  return Array.from({ length: n }, (_, i) => {
    let best = i ? 0 : 1;
    for (let j = 0; j < n; j++) if (j !== i && matrix[i * n + j] > matrix[i * n + best]) best = j;
    return best;
  });
}

function inWords({ least, largest }) {
  const [from, to] = [number(least, 2), number(largest, 2)];
  return from === to ? from : `from ${from} to ${to}`;
}

/** A text after its number; each text has its own direction. */
const numbered = (i, texts) => [`${i + 1}: `, element("bdi", { dir: "auto" }, texts[i])];

const hint = (text, devices = "") => element("span", { class: `hint ${devices}` }, text);

/** Bring a heading to the top of the window, and move the focus there. */
function goTo(heading) {
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  heading.focus({ preventScroll: true });
  heading.scrollIntoView({ behavior: still ? "instant" : "smooth", block: "start" });
}
