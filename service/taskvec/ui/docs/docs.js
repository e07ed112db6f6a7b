// Swagger UI on this service's own description. A key is the one of the page at /, in this tab only.

const KEY = "taskvec-key";
const url = document.getElementById("document").href;
const form = document.getElementById("key-form");

const bearer = () => {
  const key = sessionStorage.getItem(KEY);
  return key ? { authorization: `Bearer ${key}` } : {};
};

async function show() {
  const answer = await fetch(url, { headers: bearer() });
  if (!answer.ok) {
    const body = await answer.json().catch(() => ({}));
    document.getElementById("problem").textContent = body.detail ?? `Status ${answer.status}`;
    form.hidden = false;
    document.getElementById("key").focus();
    return;
  }
  form.hidden = true;
  SwaggerUIBundle({
    url,
    dom_id: "#swagger-ui",
    deepLinking: true,
    validatorUrl: null, // or it would send the document to a validator elsewhere
    requestInterceptor(request) {
      // A key that was given to Swagger UI itself comes first.
      const names = Object.keys(request.headers).map((name) => name.toLowerCase());
      const given = names.includes("authorization") || names.includes("api-key");
      if (!given && new URL(request.url, url).origin === location.origin) Object.assign(request.headers, bearer());
      return request;
    },
  });
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, document.getElementById("key").value.trim());
  document.getElementById("key").value = "";
  show();
});

const dark = matchMedia("(prefers-color-scheme: dark)");
const follow = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
dark.addEventListener("change", follow);
follow();
show();
