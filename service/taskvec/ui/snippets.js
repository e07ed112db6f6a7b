// The same request in three languages. A key is named by its variable, and never written out.

import { base } from "./client.js";

// JSON is what JavaScript and Python write, as there are only strings, numbers and lists in it.
const indented = (value, width) => JSON.stringify(value, null, 2).replaceAll("\n", `\n${" ".repeat(width)}`);

export function curl(body, withKey) {
  const key = withKey ? `  -H "Authorization: Bearer $TASKVEC_KEY" \\\n` : "";
  const json = indented(body, 2).replaceAll("'", "'\\''");
  return `curl -s ${base}v1/embeddings \\\n${key}  -H 'Content-Type: application/json' -d '\n  ${json}'\n`;
}

export function python(body, withKey) {
  const { model, input, dimensions, ...extra } = body;
  const key = withKey ? 'os.environ["TASKVEC_KEY"]' : '"none"';
  const fields = [`model=${JSON.stringify(model)}`, `input=${pythonList(input)}`];
  if (dimensions !== undefined) fields.push(`dimensions=${dimensions}`);
  const others = Object.entries(extra).map((pair) => pair.map((part) => JSON.stringify(part)).join(": "));
  if (others.length) fields.push(`extra_body={${others.join(", ")}}`);
  return `${withKey ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url="${base}v1", api_key=${key})
answer = client.embeddings.create(
${fields.map((field) => `    ${field},\n`).join("")})
for entry in answer.data:
    print(entry.index, entry.embedding[:4])
`;
}

export function javascript(body, withKey) {
  const key = withKey ? "\n    authorization: `Bearer ${process.env.TASKVEC_KEY}`," : "";
  return `const answer = await fetch("${base}v1/embeddings", {
  method: "POST",
  headers: {
    "content-type": "application/json",${key}
  },
  body: JSON.stringify(${indented(body, 2)}),
});
const { data, usage } = await answer.json();
for (const { index, embedding } of data) console.log(index, embedding.slice(0, 4));
`;
}

function pythonList(texts) {
  return texts.length === 1
    ? `[${JSON.stringify(texts[0])}]`
    : `[\n${texts.map((text) => `        ${JSON.stringify(text)},\n`).join("")}    ]`;
}
