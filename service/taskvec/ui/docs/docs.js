// Swagger UI on this service's own description. The key is the one of the page at /.

const KEY = "taskvec-key";
const url = document.getElementById("document").href;
const form = document.getElementById("key-form");
const field = document.getElementById("key");
const kept = document.getElementById("key-kept");

const storedKey = () => sessionStorage.getItem(KEY) ?? "";
const bearer = (key) => (key ? { authorization: `Bearer ${key}` } : {});

/** Return why the document cannot be read with a key, in a sentence; nothing if it can. */
async function problemWith(key) {
  let headers, answer;
  try {
    headers = new Headers(bearer(key));
  } catch {
    return "This cannot be an API key: it has a character that a key never has, such as a typographic quotation mark. Copy the key again.";
  }
  try {
    answer = await fetch(url, { headers });
  } catch {
    return "The service does not answer. Is it running, and is the network up?";
  }
  if (answer.ok) return "";
  const body = await answer.json().catch(() => ({}));
  return body.detail ?? `The service answered with status ${answer.status}.`;
}

/** Show Swagger UI, or the form for a key; keep a key with which the document can be read. */
async function show(key) {
  kept.hidden = !storedKey();
  const problem = await problemWith(key);
  document.getElementById("problem").textContent = problem;
  form.hidden = !problem;
  if (problem) {
    field.focus();
    return;
  }
  field.value = "";
  if (key) sessionStorage.setItem(KEY, key);
  kept.hidden = !key;
  SwaggerUIBundle({
    url,
    dom_id: "#swagger-ui",
    deepLinking: true,
    validatorUrl: null, // or it would send the document to a validator elsewhere
    requestInterceptor(request) {
      // A key that was given to Swagger UI itself comes first.
      const names = Object.keys(request.headers).map((name) => name.toLowerCase());
      const given = names.includes("authorization") || names.includes("api-key");
      if (!given && new URL(request.url, url).origin === location.origin) Object.assign(request.headers, bearer(storedKey()));
      return request;
    },
  });
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  show(field.value.trim());
});

document.getElementById("key-forget").addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  location.reload();
});

const dark = matchMedia("(prefers-color-scheme: dark)");
const follow = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
dark.addEventListener("change", follow);
follow();
show(storedKey());
