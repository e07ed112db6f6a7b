// Search: passages ranked for a query as it is typed, with two settings beside each other.

import { embed, embeddingBody } from "./client.js";
import { byId, debounce, element, fill, latest, linesOf, number, plural, renamed, showProblem } from "./elements.js";
import { repeated } from "./retry.js";
import { PASSAGES, QUERY } from "./samples.js";
import { bytesPerVector, OUTPUT_TYPES, rank } from "./vectors.js";

const SHOWN = 10;
const SIDES = ["left", "right"];

export function startSearch(model) {
  const sizes = [...model.matryoshka_dimensions].sort((a, b) => b - a);
  const small = sizes.includes(64) ? 64 : sizes.at(-1);
  const given = { left: [model.dimensions, "float"], right: [small, "binary"] };
  for (const side of SIDES) {
    const [size, type] = given[side];
    fill(byId(`search-${side}-dimensions`), sizes.map((each) => [String(each), number(each)]), size);
    fill(byId(`search-${side}-type`), OUTPUT_TYPES.map((each) => [each, each]), type);
  }
  const tasks = pairOf(model.tasks);
  byId("search-tasks").textContent = tasks.query === tasks.passage
    ? `All texts are embedded for the task ${tasks.query}.`
    : `The query is embedded as ${tasks.query}, the passages as ${tasks.passage}.`;
  byId("search-query").value ||= QUERY;
  byId("search-passages").value ||= PASSAGES.join("\n");

  const settingOf = (side) => ({
    dimensions: Number(byId(`search-${side}-dimensions`).value),
    type: byId(`search-${side}-type`).value,
  });

  // Vectors of the passages by setting, or promises of them. Another query does not take back their
  // request, or nothing would be found while one types; other passages do.
  let embedded = { passages: "", bySetting: new Map(), stop: new AbortController() };

  function vectorsOf(passages, setting) {
    const text = passages.join("\n\n");
    if (embedded.passages !== text) {
      embedded.stop.abort();
      embedded = { passages: text, bySetting: new Map(), stop: new AbortController() };
    }
    const { bySetting, stop } = embedded;
    const name = `${setting.dimensions} ${setting.type}`;
    if (!bySetting.has(name)) {
      const body = embeddingBody({ model, input: passages, task: tasks.passage, ...setting });
      const vectors = embed(body, stop.signal).then((answer) => answer.vectors);
      vectors.catch(() => bySetting.delete(name));
      bySetting.set(name, vectors);
    }
    return bySetting.get(name);
  }

  const run = latest(async ({ signal, isLatest }, { again = false } = {}) => {
    outcome();
    const found = passagesIn(byId("search-passages").value);
    const passages = found.map(({ text }) => text);
    const passageAt = (index) => `the passage of line ${found[index].line}`;
    const query = byId("search-query").value.trim();
    byId("search-count").textContent = plural(passages.length, "passage");
    if (!again) showProblem("search-problem");
    const settings = SIDES.map(settingOf);
    settings.forEach((setting, i) => {
      const bytes = bytesPerVector(setting.type, setting.dimensions);
      byId(`search-${SIDES[i]}-bytes`).textContent =
        `${plural(bytes, "byte")} a vector, ${size(bytes * 1e6)} for a million`;
    });
    if (!query || !passages.length) {
      SIDES.forEach((side) => byId(`search-${side}`).replaceChildren());
      showProblem("search-problem");
      byId("search-status").textContent = query ? "Paste passages below." : "Type a query.";
      return;
    }
    try {
      const rankings = await Promise.all(settings.map(async (setting) => {
        const [vectors, asked] = await Promise.all([
          vectorsOf(passages, setting).catch((error) => { throw placed(error, "Passages", passageAt); }),
          embed(embeddingBody({ model, input: [query], task: tasks.query, ...setting }), signal)
            .catch((error) => { throw placed(error, "Query", () => "the query"); }),
        ]);
        return rank(setting.type, asked.vectors[0], vectors);
      }));
      if (!isLatest()) return;
      showProblem("search-problem");
      show(rankings, passages, settings);
    } catch (error) {
      if (!isLatest()) return;
      SIDES.forEach((side) => byId(`search-${side}`).replaceChildren()); // those of another query
      byId("search-status").textContent = "";
      showProblem("search-problem", error);
      outcome(error);
    }
  });
  const outcome = repeated(byId("view-search"), run);

  byId("search-query").addEventListener("input", debounce(120, run));
  byId("search-query").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.isComposing) run();
  });
  byId("search-passages").addEventListener("input", debounce(500, run));
  for (const select of byId("view-search").querySelectorAll("select")) select.addEventListener("change", () => run());
  byId("search-sample").addEventListener("click", () => {
    byId("search-passages").value = PASSAGES.join("\n");
    byId("search-query").value = QUERY;
    run();
  });
  run();
}

/** The tasks of a query and of a passage; one task for both where the model has no such pair. */
function pairOf(tasks) {
  const query = tasks.find((task) => task.endsWith(".query") && tasks.includes(task.replace(/query$/, "passage")));
  if (query) return { query, passage: query.replace(/query$/, "passage") };
  return { query: tasks[0], passage: tasks[0] };
}

/** An error of an invalid request that says whether it is that of the query or of the passages. */
function placed(error, field, nameOf) {
  const named = renamed(error, nameOf);
  if (named !== error || ![400, 413, 422].includes(error.status)) return named;
  return { status: error.status, message: `${field}: ${error.message}` };
}

/** Passages as { text, line }: one a line; or, if blank lines are between them, of several lines. */
function passagesIn(field) {
  if (!/\n\s*\n/.test(field.trim())) return linesOf(field);
  const parts = [];
  field.split("\n").forEach((text, i, lines) => {
    if (!text.trim()) return;
    if (i && lines[i - 1].trim()) parts.at(-1).text += `\n${text}`;
    else parts.push({ text, line: i + 1 });
  });
  return parts.map(({ text, line }) => ({ text: text.trim(), line }));
}

function show([left, right], passages, settings) {
  const before = new Map(left.map(({ index }, place) => [index, place]));
  byId("search-left").replaceChildren(...left.slice(0, SHOWN).map(({ index, score }) => row(passages[index], score)));
  byId("search-right").replaceChildren(...right.slice(0, SHOWN).map(({ index, score }, place) =>
    row(passages[index], score, before.get(index) - place)));
  const shown = Math.min(SHOWN, left.length);
  const first = new Set(left.slice(0, shown).map(({ index }) => index));
  const both = right.slice(0, shown).filter(({ index }) => first.has(index)).length;
  const [large, little] = settings.map(({ type, dimensions }) => bytesPerVector(type, dimensions)).sort((a, b) => b - a);
  byId("search-status").textContent =
    `${both} of the first ${plural(shown, "passage")} ${both === 1 ? "is" : "are"} the same` +
    (large > little ? `; the smaller vectors take ${number(large / little, large % little ? 1 : 0)} times less memory.` : ".");
}

function row(text, score, moved) {
  const cells = [element("span", { class: "text", dir: "auto", title: text }, text)];
  if (moved !== undefined) cells.push(movement(moved));
  return element("li", {}, ...cells, element("span", { class: "score", title: "similarity" }, number(score, 3)));
}

function movement(places) {
  if (!places) return element("span", { class: "moved" }, element("span", { class: "hidden" }, "same place"));
  const way = places > 0 ? "up" : "down";
  return element("span", { class: `moved ${way}` },
    element("span", { "aria-hidden": "true" }, `${places > 0 ? "▲" : "▼"} ${Math.abs(places)}`),
    element("span", { class: "hidden" }, `${way} ${Math.abs(places)}`));
}

function size(bytes) {
  return bytes >= 1e9 ? `${number(bytes / 1e9, 1)} GB` : `${number(bytes / 1e6)} MB`;
}
