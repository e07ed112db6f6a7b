// Try: texts in, vectors out, with the time of each stage and the request in three languages.

import { apiKey, embed, embeddingBody } from "./client.js";
import { byId, copy, element, fill, latest, linesOf, number, plural, renamed, showProblem, submitByKey } from "./elements.js";
import { repeated } from "./retry.js";
import { TRY } from "./samples.js";
import { curl, javascript, python } from "./snippets.js";
import { bytesPerVector, OUTPUT_TYPES } from "./vectors.js";

const LANGUAGES = { curl, python, javascript };
const SHOWN_VALUES = 6;
const SHOWN_VECTORS = 20;

export function startTry(model) {
  fill(byId("try-task"), model.tasks.map((task) => [task, task]), model.tasks[0]);
  const sizes = [...model.matryoshka_dimensions].sort((a, b) => b - a);
  fill(byId("try-dimensions"), sizes.map((size) => [String(size), number(size)]), model.dimensions);
  fill(byId("try-type"), OUTPUT_TYPES.map((type) => [type, type]), "float");
  byId("try-texts").value ||= TRY.join("\n");

  const settings = () => ({
    model,
    input: linesOf(byId("try-texts").value).map(({ text }) => text),
    task: byId("try-task").value,
    dimensions: Number(byId("try-dimensions").value),
    type: byId("try-type").value,
  });

  let answered = null; // the request whose vectors are shown

  const showCode = () => {
    const language = document.querySelector("input[name=language]:checked").value;
    byId("try-code").textContent = LANGUAGES[language](embeddingBody(settings()), apiKey() !== "");
    const earlier = answered !== null && answered !== JSON.stringify(embeddingBody(settings()));
    const note = earlier ? "This is the result of an earlier request. Press Embed for that of the form." : "";
    if (byId("try-earlier").textContent !== note) byId("try-earlier").textContent = note;
  };

  const showResult = (body) => {
    answered = body && JSON.stringify(body);
    byId("try-result").hidden = !body;
    showCode();
  };

  const run = latest(async ({ signal, isLatest }, { again = false } = {}) => {
    const asked = settings();
    const lines = linesOf(byId("try-texts").value);
    outcome();
    if (!lines.length) {
      byId("try-status").textContent = "";
      showResult(null);
      showProblem("try-problem", { message: "Write at least one text." });
      return;
    }
    if (!again) {
      showProblem("try-problem");
      byId("try-status").textContent = "Embedding…";
    }
    try {
      const answer = await embed(embeddingBody(asked), signal);
      if (!isLatest()) return;
      showProblem("try-problem");
      showAnswer(asked, answer);
      showResult(embeddingBody(asked));
    } catch (error) {
      if (!isLatest()) return;
      showResult(null);
      byId("try-status").textContent = "";
      showProblem("try-problem", renamed(error, (index) => `line ${lines[index].line}`));
      outcome(error);
    }
  });
  const outcome = repeated(byId("view-try"), run);

  byId("try-form").addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  submitByKey(byId("try-form"));
  byId("view-try").addEventListener("input", showCode);
  addEventListener("key-changed", showCode);
  byId("try-copy").addEventListener("click", (event) => copy(byId("try-code").textContent, event.target));
  showCode();
  run();
}

function showAnswer({ input, task, dimensions, type }, { vectors, tokens, stages, milliseconds }) {
  const bytes = bytesPerVector(type, dimensions);
  byId("try-status").textContent =
    `${plural(vectors.length, "vector")} for ${task}, of ${number(dimensions)} ${type === "float" ? "" : `${type} `}dimensions, ` +
    `${plural(bytes, "byte")} each. ${plural(tokens, "token")}.`;

  const rows = vectors.slice(0, SHOWN_VECTORS).map((vector, i) =>
    element("li", {},
      element("span", { class: "text", dir: "auto", title: input[i] }, input[i]),
      element("span", { class: "values" }, shortened(vector, type)),
      element("button", {
        type: "button", class: "quiet", "aria-label": `Copy vector ${i + 1}`,
        onclick: (event) => copy(JSON.stringify(Array.from(vector)), event.target),
      }, "Copy"),
    ),
  );
  if (vectors.length > SHOWN_VECTORS) {
    rows.push(element("li", {}, element("span", { class: "values" }, `and ${vectors.length - SHOWN_VECTORS} more`)));
  }
  byId("try-vectors").replaceChildren(...rows);
  showStages(stages, milliseconds);
}

function shortened(vector, type) {
  const values = Array.from(vector.slice(0, SHOWN_VALUES), (value) =>
    (type === "float" ? value.toFixed(4) : String(value)).replace("-", "\u2212"));
  return values.join("  ") + (vector.length > SHOWN_VALUES ? `  … ${plural(vector.length, "value")}` : "");
}

function showStages(stages, milliseconds) {
  const sum = stages.reduce((total, [, duration]) => total + duration, 0) || 1;
  const bar = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  bar.setAttribute("viewBox", `0 0 ${sum} 1`);
  bar.setAttribute("preserveAspectRatio", "none");
  let start = 0;
  stages.forEach(([, duration], i) => {
    const part = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    for (const [name, value] of Object.entries({ x: start, y: 0, width: duration, height: 1 })) part.setAttribute(name, value);
    part.setAttribute("fill", `var(--task-${i % 6})`);
    bar.append(part);
    start += duration;
  });
  byId("try-bar").replaceChildren(bar);
  byId("try-stages").replaceChildren(
    ...stages.map(([name, duration], i) => figure(name, duration, `mark-${i % 6}`)),
    figure("round trip", milliseconds, "plain"),
  );
}

const figure = (name, milliseconds, mark) =>
  element("div", { class: mark }, element("dt", {}, name), element("dd", {}, `${number(milliseconds, 1)} ms`));
