// The Node clients of tests/real_clients: each embeds texts in the way that its users write.
//
// Reads calls as lines of JSON from standard input, and answers each with one line: {"vectors"} or
// {"error": {"name", "status", "message"}}. Run by node_clients.py in the folder with the packages.

import { createInterface } from "node:readline";

const INPUT_TYPES = { "retrieval.query": "search_query", "retrieval.passage": "search_document" };
const SIDES = { "retrieval.query": "query", "retrieval.passage": "document" };
const TASK_TYPES = {
  "retrieval.query": "RETRIEVAL_QUERY",
  "retrieval.passage": "RETRIEVAL_DOCUMENT",
  "text-matching": "SEMANTIC_SIMILARITY",
};
const inputType = (task) => INPUT_TYPES[task] ?? task;
const taskType = (task) => TASK_TYPES[task] ?? task.toUpperCase();
const named = (call) => (call.task ? `${call.model}:${call.task}` : call.model);
const bearer = (call) => ({ Authorization: `Bearer ${call.key}` });
// Only what a call sets: clients differ in what they do with undefined.
const given = (options) =>
  Object.fromEntries(Object.entries(options).filter(([, value]) => value !== undefined));

// LangChain has a method for queries and one for documents.
async function langchain(embeddings, call) {
  if (call.task !== "retrieval.query") return embeddings.embedDocuments(call.texts);
  return Promise.all(call.texts.map((text) => embeddings.embedQuery(text)));
}

async function aiSdk(model, call, providerOptions) {
  const { embed, embedMany } = await import("ai");
  const options = given({ model, providerOptions, maxRetries: call.retries });
  if (call.texts.length > 1) {
    return (await embedMany({ ...options, values: call.texts })).embeddings;
  }
  return [(await embed({ ...options, value: call.texts[0] })).embedding];
}

async function openaiLike(client, call) {
  const answer = await client.embeddings.create(
    given({
      model: named(call),
      input: call.texts,
      dimensions: call.dimensions,
      embedding_type: call.type,
    }),
  );
  return answer.data.map((entry) => entry.embedding);
}

const clients = {
  async openai(call) {
    const { OpenAI } = await import("openai");
    const options = given({ apiKey: call.key, maxRetries: call.retries });
    return openaiLike(new OpenAI({ baseURL: `${call.url}/v1`, ...options }), call);
  },

  async "openai (Azure)"(call) {
    const { AzureOpenAI } = await import("openai");
    const options = given({ apiKey: call.key, maxRetries: call.retries });
    const azure = { endpoint: call.url, apiVersion: "2024-10-21" };
    return openaiLike(new AzureOpenAI({ ...azure, ...options }), call);
  },

  async "cohere-ai"(call) {
    const { CohereClientV2 } = await import("cohere-ai");
    const options = given({ token: call.key, maxRetries: call.retries });
    const type = call.type ?? "float";
    const answer = await new CohereClientV2({ baseUrl: call.url, ...options }).embed(
      given({
        model: call.model,
        texts: call.texts,
        inputType: inputType(call.task),
        embeddingTypes: [type],
        outputDimension: call.dimensions,
        truncate: "NONE",
      }),
    );
    return answer.embeddings[type];
  },

  async "cohere-ai (v1)"(call) {
    const { CohereClient } = await import("cohere-ai");
    const options = given({ token: call.key, maxRetries: call.retries });
    const answer = await new CohereClient({ environment: call.url, ...options }).embed(
      given({
        model: call.model,
        texts: call.texts,
        inputType: inputType(call.task),
        embeddingTypes: call.type && [call.type],
        truncate: "NONE",
      }),
    );
    return call.type ? answer.embeddings[call.type] : answer.embeddings;
  },

  async "@google/genai"(call) {
    const { GoogleGenAI } = await import("@google/genai");
    const client = new GoogleGenAI({ apiKey: call.key, httpOptions: { baseUrl: call.url } });
    const answer = await client.models.embedContent({
      model: call.model,
      contents: call.texts,
      config: given({ taskType: taskType(call.task), outputDimensionality: call.dimensions }),
    });
    return answer.embeddings.map((entry) => entry.values);
  },

  async ollama(call) {
    const { Ollama } = await import("ollama");
    const client = new Ollama({ host: call.url, headers: bearer(call) });
    const answer = await client.embed(
      given({
        model: named(call),
        input: call.texts,
        dimensions: call.dimensions,
        truncate: false,
      }),
    );
    return answer.embeddings;
  },

  async voyageai(call) {
    const { VoyageAIClient } = await import("voyageai");
    const options = given({ apiKey: call.key, maxRetries: call.retries });
    const answer = await new VoyageAIClient({ environment: `${call.url}/v1`, ...options }).embed(
      given({
        model: call.model,
        input: call.texts,
        inputType: SIDES[call.task] ?? call.task,
        outputDimension: call.dimensions,
        outputDtype: call.type,
        truncation: false,
      }),
    );
    return answer.data.map((entry) => entry.embedding);
  },

  async "@huggingface/inference"(call) {
    const { InferenceClient } = await import("@huggingface/inference");
    return new InferenceClient(call.key, { endpointUrl: call.url }).featureExtraction(
      given({ inputs: call.texts, prompt_name: call.task, dimensions: call.dimensions }),
    );
  },

  async "@ai-sdk/openai"(call) {
    const { createOpenAI } = await import("@ai-sdk/openai");
    const provider = createOpenAI({ baseURL: `${call.url}/v1`, apiKey: call.key });
    const model = provider.embedding(named(call));
    return aiSdk(model, call, { openai: given({ dimensions: call.dimensions }) });
  },

  async "@ai-sdk/openai-compatible"(call) {
    const { createOpenAICompatible } = await import("@ai-sdk/openai-compatible");
    const provider = createOpenAICompatible({
      name: "taskvec",
      baseURL: `${call.url}/v1`,
      apiKey: call.key,
    });
    const model = provider.embeddingModel(named(call));
    return aiSdk(model, call, { taskvec: given({ dimensions: call.dimensions }) });
  },

  async "@ai-sdk/azure"(call) {
    const { createAzure } = await import("@ai-sdk/azure");
    const provider = createAzure({ baseURL: `${call.url}/openai/v1`, apiKey: call.key });
    const model = provider.embedding(named(call));
    return aiSdk(model, call, { openai: given({ dimensions: call.dimensions }) });
  },

  async "@ai-sdk/cohere"(call) {
    const { createCohere } = await import("@ai-sdk/cohere");
    const provider = createCohere({ baseURL: `${call.url}/v2`, apiKey: call.key });
    const model = provider.embedding(call.model);
    return aiSdk(model, call, {
      cohere: given({
        inputType: inputType(call.task),
        outputDimension: call.dimensions,
        truncate: "NONE",
      }),
    });
  },

  async "@ai-sdk/google"(call) {
    const { createGoogle } = await import("@ai-sdk/google");
    const model = createGoogle({ baseURL: `${call.url}/v1beta`, apiKey: call.key }).embedding(
      call.model,
    );
    return aiSdk(model, call, {
      google: given({ taskType: taskType(call.task), outputDimensionality: call.dimensions }),
    });
  },

  async "@langchain/openai"(call) {
    const { OpenAIEmbeddings } = await import("@langchain/openai");
    const embeddings = new OpenAIEmbeddings(
      given({
        model: named(call),
        apiKey: call.key,
        dimensions: call.dimensions,
        maxRetries: call.retries,
        configuration: { baseURL: `${call.url}/v1` },
      }),
    );
    return langchain(embeddings, call);
  },

  async "@langchain/cohere"(call) {
    const { CohereClient } = await import("cohere-ai");
    const { CohereEmbeddings } = await import("@langchain/cohere");
    // Without a client of one's own there is no way to name another address.
    const client = new CohereClient({ token: call.key, environment: call.url, maxRetries: 0 });
    const options = given({ model: call.model, maxRetries: call.retries });
    return langchain(new CohereEmbeddings({ client, ...options }), call);
  },

  async "@langchain/google-genai"(call) {
    const { GoogleGenerativeAIEmbeddings } = await import("@langchain/google-genai");
    const embeddings = new GoogleGenerativeAIEmbeddings(
      given({
        model: call.model,
        apiKey: call.key,
        baseUrl: call.url,
        taskType: taskType(call.task),
        outputDimensionality: call.dimensions,
        maxRetries: call.retries,
      }),
    );
    return langchain(embeddings, call);
  },

  async "@langchain/ollama"(call) {
    const { OllamaEmbeddings } = await import("@langchain/ollama");
    const embeddings = new OllamaEmbeddings(
      given({
        model: named(call),
        baseUrl: call.url,
        headers: bearer(call),
        dimensions: call.dimensions,
        maxRetries: call.retries,
      }),
    );
    return langchain(embeddings, call);
  },
};

// The response of a retried call may be inside another error.
const status = (error) =>
  error.status ?? error.statusCode ?? error.status_code ?? error.httpResponse?.status ?? null;

console.log(JSON.stringify(Object.keys(clients)));
for await (const line of createInterface({ input: process.stdin })) {
  const call = JSON.parse(line);
  let answer;
  try {
    const vectors = await clients[call.client](call);
    answer = { vectors: vectors.map((vector) => Array.from(vector)) };
  } catch (error) {
    answer = {
      error: {
        name: error.constructor.name,
        status: status(error) ?? status(error.lastError ?? {}),
        message: String(error.message),
      },
    };
  }
  console.log(JSON.stringify(answer));
}
