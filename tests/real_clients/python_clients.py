"""Python clients: each embeds texts in the way that its users write."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import litellm
import voyageai
from chromadb.utils import embedding_functions as chroma
from haystack.components.embedders import OpenAITextEmbedder
from haystack.dataclasses import Document
from haystack.utils import Secret
from haystack_integrations.components.embedders.cohere import (
    CohereDocumentEmbedder,
    CohereTextEmbedder,
)
from haystack_integrations.components.embedders.google_genai import GoogleGenAIDocumentEmbedder
from haystack_integrations.components.embedders.ollama import OllamaDocumentEmbedder
from langchain_cohere import CohereEmbeddings
from langchain_core.embeddings import Embeddings
from langchain_google_genai import GoogleGenerativeAIEmbeddings
from langchain_ollama import OllamaEmbeddings
from langchain_openai import AzureOpenAIEmbeddings, OpenAIEmbeddings
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.embeddings.cohere import CohereEmbedding
from llama_index.embeddings.ollama import OllamaEmbedding
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference

from real_clients.calls import QUERY, Call, RefusedError

INPUT_TYPES = {QUERY: "search_query", "retrieval.passage": "search_document"}
"""Cohere's names of our tasks."""

SIDES = {QUERY: "query", "retrieval.passage": "document"}
"""Voyage's names of our tasks."""

TASK_TYPES = {
    QUERY: "RETRIEVAL_QUERY",
    "retrieval.passage": "RETRIEVAL_DOCUMENT",
    "clustering": "CLUSTERING",
}
"""Gemini's names of our tasks."""

Vectors = list[list[float]]
Client = Callable[[Call], Any]
CLIENTS: dict[str, Client] = {}


def client(name: str) -> Callable[[Client], Client]:
    """Add a client to ``CLIENTS``."""

    def add(function: Client) -> Client:
        CLIENTS[name] = function
        return function

    return add


def embed(name: str, call: Call) -> Vectors:
    """Embed with a client.

    Raises:
        RefusedError: the client has raised an exception.
    """
    try:
        return [[float(value) for value in vector] for vector in CLIENTS[name](call)]
    except Exception as error:
        response = getattr(error, "response", None)
        status = getattr(error, "status_code", None) or getattr(response, "status_code", None)
        raise RefusedError(type(error).__name__, status, str(error)) from error


def given(**options: Any) -> dict[str, Any]:
    """Return the options that are set: clients differ in what they do with None."""
    return {name: value for name, value in options.items() if value is not None}


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Set variables that the package of an API reads, for products without such an option."""
    os.environ |= variables
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]


def langchain(embeddings: Embeddings, call: Call) -> Vectors:
    """LangChain has a method for queries and one for documents."""
    if call.task == QUERY:
        return [embeddings.embed_query(text) for text in call.texts]
    return embeddings.embed_documents(list(call.texts))


def llama_index(embedding: BaseEmbedding, call: Call) -> Vectors:
    """LlamaIndex has a method for queries and one for documents."""
    if call.task == QUERY:
        return [embedding.get_query_embedding(text) for text in call.texts]
    return embedding.get_text_embedding_batch(list(call.texts))


@client("langchain-openai")
def langchain_openai(call: Call) -> Vectors:
    # Without check_embedding_ctx_length=False it sends OpenAI's token ids instead of texts.
    embeddings = OpenAIEmbeddings(
        model=call.named,
        base_url=f"{call.url}/v1",
        api_key=call.key,
        check_embedding_ctx_length=False,
        **given(dimensions=call.dimensions, max_retries=call.retries),
    )
    return langchain(embeddings, call)


@client("langchain-openai (Azure)")
def langchain_azure(call: Call) -> Vectors:
    embeddings = AzureOpenAIEmbeddings(
        azure_deployment=call.named,
        azure_endpoint=call.url,
        api_key=call.key,
        api_version="2024-10-21",
        check_embedding_ctx_length=False,
        **given(dimensions=call.dimensions, max_retries=call.retries),
    )
    return langchain(embeddings, call)


@client("langchain-cohere")
def langchain_cohere(call: Call) -> Vectors:
    embeddings = CohereEmbeddings(
        model=call.model,
        base_url=call.url,
        cohere_api_key=call.key,
        **given(max_retries=call.retries),
    )
    return langchain(embeddings, call)


@client("langchain-google-genai")
def langchain_google(call: Call) -> Vectors:
    embeddings = GoogleGenerativeAIEmbeddings(
        model=call.model,
        base_url=call.url,
        google_api_key=call.key,
        **given(output_dimensionality=call.dimensions),
    )
    return langchain(embeddings, call)


@client("langchain-ollama")
def langchain_ollama(call: Call) -> Vectors:
    embeddings = OllamaEmbeddings(
        model=call.named,
        base_url=call.url,
        client_kwargs={"headers": {"Authorization": f"Bearer {call.key}"}},
        **given(dimensions=call.dimensions),
    )
    return langchain(embeddings, call)


@client("llama-index-embeddings-openai-like")
def llama_index_openai(call: Call) -> Vectors:
    embedding = OpenAILikeEmbedding(
        model_name=call.named,
        api_base=f"{call.url}/v1",
        api_key=call.key,
        **given(dimensions=call.dimensions, max_retries=call.retries),
    )
    return llama_index(embedding, call)


@client("llama-index-embeddings-cohere")
def llama_index_cohere(call: Call) -> Vectors:
    embedding = CohereEmbedding(
        model_name="embed-v4.0",  # it knows Cohere's names only: an alias of the served model
        base_url=call.url,
        api_key=call.key,
        truncate="NONE",
        **given(max_retries=call.retries, embedding_type=call.type),
    )
    return llama_index(embedding, call)


@client("llama-index-embeddings-ollama")
def llama_index_ollama(call: Call) -> Vectors:
    embedding = OllamaEmbedding(
        model_name=call.named,
        base_url=call.url,
        client_kwargs={"headers": {"Authorization": f"Bearer {call.key}"}},
    )
    return llama_index(embedding, call)


@client("llama-index-embeddings-text-embeddings-inference")
def llama_index_tei(call: Call) -> Vectors:
    embedding = TextEmbeddingsInference(
        model_name=call.model,
        base_url=call.url,
        auth_token=call.key,
        truncate_text=False,
    )
    return llama_index(embedding, call)


@client("haystack-ai (OpenAI)")
def haystack_openai(call: Call) -> Vectors:
    embedder = OpenAITextEmbedder(
        model=call.named,
        api_base_url=f"{call.url}/v1",
        api_key=Secret.from_token(call.key),
        **given(dimensions=call.dimensions, max_retries=call.retries),
    )
    return [embedder.run(text)["embedding"] for text in call.texts]


@client("cohere-haystack")
def haystack_cohere(call: Call) -> Any:
    options: Any = {
        "model": call.model,
        "api_base_url": call.url,
        "api_key": Secret.from_token(call.key),
        "truncate": "NONE",
    }
    if call.task == QUERY:
        embedder = CohereTextEmbedder(**options)
        return [embedder.run(text)["embedding"] for text in call.texts]
    documents = [Document(content=text) for text in call.texts]
    done = CohereDocumentEmbedder(**options, progress_bar=False).run(documents)["documents"]
    return [document.embedding for document in done]


@client("google-genai-haystack")
def haystack_google(call: Call) -> Any:
    config = given(task_type=TASK_TYPES.get(call.task), output_dimensionality=call.dimensions)
    documents = [Document(content=text) for text in call.texts]
    with environment(GOOGLE_GEMINI_BASE_URL=call.url):
        embedder = GoogleGenAIDocumentEmbedder(
            model=call.model,
            api_key=Secret.from_token(call.key),
            config=config,
            progress_bar=False,
        )
        done = embedder.run(documents)["documents"]
    return [document.embedding for document in done]


@client("ollama-haystack")
def haystack_ollama(call: Call) -> Any:
    embedder = OllamaDocumentEmbedder(
        model=call.named, url=call.url, progress_bar=False, **given(dimensions=call.dimensions)
    )
    documents = [Document(content=text) for text in call.texts]
    with environment(OLLAMA_API_KEY=call.key):
        done = embedder.run(documents)["documents"]
    return [document.embedding for document in done]


@client("chromadb (OpenAI)")
def chroma_openai(call: Call) -> Any:
    function = chroma.OpenAIEmbeddingFunction(
        model_name=call.named,
        api_base=f"{call.url}/v1",
        api_key=call.key,
        **given(dimensions=call.dimensions),
    )
    return function(list(call.texts))


@client("chromadb (Ollama)")
def chroma_ollama(call: Call) -> Any:
    with environment(OLLAMA_API_KEY=call.key):
        function = chroma.OllamaEmbeddingFunction(url=call.url, model_name=call.named)
    return function(list(call.texts))


@client("chromadb (Hugging Face server)")
def chroma_hugging_face(call: Call) -> Any:
    function = chroma.HuggingFaceEmbeddingServer(url=f"{call.url}/embed", api_key=call.key)
    return function(list(call.texts))


@client("voyageai")
def voyage(call: Call) -> Any:
    client = voyageai.Client(
        api_key=call.key, base_url=f"{call.url}/v1", **given(max_retries=call.retries)
    )
    return client.embed(
        list(call.texts),
        model=call.model,
        input_type=SIDES.get(call.task, call.task),
        truncation=False,
        output_dimension=call.dimensions,
        output_dtype=call.type,
    ).embeddings


def through_litellm(call: Call, model: str, api_base: str, **options: Any) -> Vectors:
    """Embed with LiteLLM."""
    answer = litellm.embedding(
        model=model,
        input=list(call.texts),
        api_base=api_base,
        api_key=call.key,
        **given(dimensions=call.dimensions, num_retries=call.retries),
        **options,
    )
    return [entry["embedding"] for entry in answer.data]


@client("litellm (openai)")
def litellm_openai(call: Call) -> Vectors:
    return through_litellm(call, f"openai/{call.named}", f"{call.url}/v1")


@client("litellm (jina_ai)")
def litellm_jina(call: Call) -> Vectors:
    return through_litellm(call, f"jina_ai/{call.named}", f"{call.url}/v1")


@client("litellm (voyage)")
def litellm_voyage(call: Call) -> Vectors:
    return through_litellm(call, f"voyage/{call.named}", f"{call.url}/v1")


@client("litellm (infinity)")
def litellm_infinity(call: Call) -> Vectors:
    return through_litellm(call, f"infinity/{call.named}", call.url)


@client("litellm (cohere)")
def litellm_cohere(call: Call) -> Vectors:
    input_type = INPUT_TYPES.get(call.task, call.task)
    where = f"{call.url}/v2/embed"
    return through_litellm(call, f"cohere/{call.model}", where, input_type=input_type)


@client("litellm (gemini)")
def litellm_gemini(call: Call) -> Vectors:
    task_type = TASK_TYPES.get(call.task, call.task)
    return through_litellm(call, f"gemini/{call.model}", f"{call.url}/v1beta", task_type=task_type)


@client("litellm (ollama)")
def litellm_ollama(call: Call) -> Vectors:
    return through_litellm(call, f"ollama/{call.named}", call.url)


@client("litellm (azure)")
def litellm_azure(call: Call) -> Vectors:
    return through_litellm(call, f"azure/{call.named}", call.url, api_version="2024-10-21")
