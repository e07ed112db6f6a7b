// The page: which view is shown, the model, and the API key.

import { apiKey, forgetApiKey, readModel } from "./client.js";
import { byId, number, showProblem } from "./elements.js";
import { startCompare } from "./compare.js";
import { startNow } from "./now.js";
import { RETRY_MILLISECONDS } from "./retry.js";
import { startSearch } from "./search.js";
import { startTry } from "./try.js";

const NAMES = ["try", "search", "compare", "now"];

const now = startNow();
const starts = { try: startTry, search: startSearch, compare: startCompare };
let model = null;

/** Show the view that the address names; its own work begins when it is first seen. */
function showView({ focus = true } = {}) {
  const name = NAMES.includes(location.hash.slice(1)) ? location.hash.slice(1) : NAMES[0];
  for (const each of NAMES) {
    byId(`view-${each}`).hidden = each !== name;
    const link = document.querySelector(`nav a[href="#${each}"]`);
    if (each === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const title = byId(`${name}-title`);
  document.title = `${title.textContent} · taskvec`;
  if (focus) {
    scrollTo(0, 0);
    title.focus({ preventScroll: true });
  }
  if (name === "now") now.show();
  else now.hide();
  begin(name);
}

function begin(name) {
  if (!model || !starts[name]) return;
  const start = starts[name];
  delete starts[name];
  start(model);
}

/** Read the model, with a new key if one is given; return whether that succeeded. */
async function loadModel(key) {
  byId("key-forget").hidden = !apiKey();
  try {
    model = await readModel(key);
  } catch (error) {
    if (error.status !== 401) showProblem("page-problem", error); // else the form for the key says so
    return false;
  }
  showProblem("page-problem");
  byId("main").hidden = false;
  byId("model").textContent =
    `${model.id}, ${number(model.dimensions)} dimensions, texts of ${number(model.max_tokens)} tokens`;
  byId("key-form").hidden = true;
  byId("key-forget").hidden = !apiKey();
  showView({ focus: false });
  return true;
}

addEventListener("key-needed", ({ detail }) => {
  byId("key-message").textContent = detail;
  if (byId("key-form").hidden) {
    byId("key-form").hidden = false;
    byId("key").focus();
  }
});

byId("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  byId("key-message").textContent = "";
  if (!(await loadModel(byId("key").value.trim()))) return;
  byId("key").value = "";
  dispatchEvent(new Event("key-changed"));
});

byId("key-forget").addEventListener("click", () => {
  forgetApiKey();
  location.reload();
});

addEventListener("hashchange", () => {
  if (NAMES.includes(location.hash.slice(1))) showView(); // the link that skips to the content is none
});

showView({ focus: false });
await loadModel();
while (!model && byId("key-form").hidden) {
  // The service may be starting. Where it needs a key, the form goes on.
  await new Promise((done) => setTimeout(done, RETRY_MILLISECONDS));
  if (document.visibilityState === "visible") await loadModel();
}
if (!model) showProblem("page-problem");
