// Elements of the page. Texts are set as text, never as HTML.

export const byId = (id) => document.getElementById(id);

/** Make an element with attributes and children. */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value;
    else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== null && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

/** Fill a select with [value, label] pairs; one of them is chosen. */
export function fill(select, options, chosen) {
  select.replaceChildren(
    ...options.map(([value, label]) => {
      const option = element("option", { value }, label);
      option.selected = value === String(chosen);
      return option;
    }),
  );
}

/** Tell a screen reader what happened. */
export function announce(text) {
  byId("announcement").textContent = text;
}

/** Copy a text to the clipboard, and say on the button that it was done. */
export async function copy(text, button) {
  const label = button.dataset.label ?? (button.dataset.label = button.textContent);
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    // Pages that come neither over https nor from this machine have no clipboard.
    button.textContent = "Not allowed here";
  }
  announce(button.textContent);
  setTimeout(() => { button.textContent = label; }, 1500);
}

/** Show a problem in the words of the service, or hide the last one. */
export function showProblem(id, error) {
  const box = byId(id);
  if (error && !box.hidden && box.textContent === error.message) return; // said once by a screen reader
  box.hidden = !error;
  box.textContent = error ? error.message : "";
}

/** Submit a form by Ctrl + Enter (on a Mac: Cmd + Enter) in one of its fields. */
export function submitByKey(form) {
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
}

/** Call a function when nothing called it for so many milliseconds. */
export function debounce(milliseconds, work) {
  let timer;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(work, milliseconds);
  };
}

/**
 * Run an asynchronous function so that only its latest call counts: the signal of the earlier ones
 * is aborted, and what they return later is dropped.
 */
export function latest(work) {
  let current;
  return async (...given) => {
    current?.abort();
    const mine = (current = new AbortController());
    const isLatest = () => current === mine;
    return work({ signal: mine.signal, isLatest }, ...given);
  };
}

/** The texts of a field, one a line, as { text, line }: lines count from 1, blank ones too. */
export const linesOf = (field) =>
  field.split("\n").map((text, i) => ({ text: text.trim(), line: i + 1 })).filter(({ text }) => text);

/** An error that calls an entry of the request's input what the page calls it. */
export function renamed(error, nameOf) {
  if (!error.message?.includes("input[")) return error;
  const message = error.message.replace(/input\[(\d+)\]/g, (_, index) => nameOf(Number(index)));
  return { status: error.status, name: error.name, message: message[0].toUpperCase() + message.slice(1) };
}

export const number = (value, digits = 0) =>
  value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }).replace("-", "\u2212");

export const plural = (count, one, many = `${one}s`) => `${number(count)} ${count === 1 ? one : many}`;
