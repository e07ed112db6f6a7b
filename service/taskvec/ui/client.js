// Requests to the service that this page comes from, and to nothing else.

const KEY = "taskvec-key";
const UNUSABLE_KEY =
  "This cannot be an API key: it has a character that a key never has, such as a typographic quotation mark. Copy the key again.";

/** Where the service is; ends with a slash. A proxy may serve it below a path. */
export const base = new URL("./", document.baseURI).href;

export const apiKey = () => sessionStorage.getItem(KEY) ?? "";

export const forgetApiKey = () => sessionStorage.removeItem(KEY);

/** An error with the message that the service gave. */
export class ServiceError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function send(path, options = {}, key = apiKey()) {
  const headers = new Headers(options.headers);
  try {
    if (key) headers.set("authorization", `Bearer ${key}`);
  } catch {
    throw keyNeeded(UNUSABLE_KEY);
  }
  let response;
  try {
    response = await fetch(base + path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError(0, "The service does not answer. Is it running, and is the network up?");
  }
  if (response.ok) return response;
  const text = await response.text();
  let message = text;
  try {
    const body = JSON.parse(text);
    message = body.error?.message ?? body.detail ?? body.error ?? text;
  } catch {
    // A proxy's own page, say.
  }
  if (response.status === 401) throw keyNeeded(message);
  throw new ServiceError(response.status, message || `The service answered with status ${response.status}.`);
}

function keyNeeded(message) {
  dispatchEvent(new CustomEvent("key-needed", { detail: message }));
  return new ServiceError(401, message);
}

/** The served model, as /v1/models describes it; a key with which it could be read is kept. */
export async function readModel(key = apiKey()) {
  const body = await (await send("v1/models", {}, key)).json();
  if (key) sessionStorage.setItem(KEY, key);
  return body.data[0];
}

export async function readMetrics(signal) {
  return (await send("metrics", { signal })).text();
}

/** The body of a request, without the fields that would have their default. */
export function embeddingBody({ model, input, task, dimensions, type }) {
  const body = { model: model.id, input };
  if (task) body.task = task;
  if (dimensions !== model.dimensions) body.dimensions = dimensions;
  if (type !== "float") body.embedding_type = type;
  return body;
}

/**
 * Embed texts.
 * Returns vectors (arrays of numbers), tokens, milliseconds and stages ([name, milliseconds]).
 */
export async function embed(body, signal) {
  const started = performance.now();
  const numbers = body.embedding_type !== undefined;
  const response = await send("v1/embeddings", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, encoding_format: numbers ? "float" : "base64" }),
    signal,
  });
  const answer = await response.json();
  return {
    vectors: answer.data.map((entry) => (numbers ? entry.embedding : floats(entry.embedding))),
    tokens: answer.usage.total_tokens,
    milliseconds: performance.now() - started,
    stages: stagesOf(response.headers.get("server-timing") ?? ""),
  };
}

function floats(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Float32Array.from({ length: bytes.length / 4 }, (_, i) => view.getFloat32(4 * i, true));
}

function stagesOf(header) {
  return [...header.matchAll(/([\w-]+);dur=([\d.]+)/g)].map(([, name, value]) => [name, Number(value)]);
}
