"""What each client can ask for, and what it makes of refusals: facts of these versions."""

from __future__ import annotations

from typing import NamedTuple

ALL = (400, 401, 429, 503)
QUANTISED = ("int8", "uint8", "binary", "ubinary")


class Client(NamedTuple):
    """A client of tests/real_clients, and what its users should know.

    Attributes:
        name: in clients.mjs or python_clients.py.
        bad_request: class of its exception for 400.
        unauthorized: class of its exception for 401.
        sides: it can ask for a task; otherwise it gets the default task for queries, too.
        unknown_task: it passes on a task that it does not know.
        dimensions: it can ask for any number of dimensions.
        types: output types that it can ask for.
        truncates: it cannot ask for a refusal of texts that are too long, or does not by default.
        hidden: statuses for which its exception does not have our message.
        swallows: it returns empty vectors for documents that were refused.
        fewest_retries: ``retries`` of tests that expect an error, where its own are slow.
        retried: statuses after which it repeats a request.
    """

    name: str
    bad_request: str
    unauthorized: str
    sides: bool = True
    unknown_task: bool = True
    dimensions: bool = True
    types: tuple[str, ...] = ()
    truncates: bool = False
    hidden: tuple[int, ...] = ()
    swallows: bool = False
    fewest_retries: int | None = None
    retried: tuple[int, ...] = ()


def _openai(name: str, *, retries: bool = True, **traits: object) -> Client:
    """Return a client that raises the exceptions of OpenAI's SDK."""
    client = Client(name, "BadRequestError", "AuthenticationError")
    return client._replace(retried=(429, 503) if retries else (), **traits)


def _cohere(name: str, **traits: object) -> Client:
    """Return a client that raises the exceptions of Cohere's SDK."""
    client = Client(name, "BadRequestError", "UnauthorizedError", retried=(429, 503))
    return client._replace(**traits)


def _ollama(name: str, **traits: object) -> Client:
    """Return a client that raises the exceptions of the ollama package, which repeats nothing."""
    return Client(name, "ResponseError", "ResponseError")._replace(**traits)


def _ai_sdk(name: str, **traits: object) -> Client:
    """Return a provider of the AI SDK."""
    return Client(name, "APICallError", "APICallError", retried=(429, 503))._replace(**traits)


NODE = [
    _openai("openai", types=QUANTISED),
    _openai("openai (Azure)", types=QUANTISED),
    _cohere("cohere-ai", types=QUANTISED),
    _cohere("cohere-ai (v1)", types=QUANTISED, dimensions=False),
    Client("@google/genai", "ApiError", "ApiError"),
    _ollama("ollama"),
    # It checks the task before it sends a request.
    Client(
        "voyageai",
        "VoyageAIError",
        "VoyageAIError",
        unknown_task=False,
        types=QUANTISED,
        retried=(429, 503),
    ),
    Client(
        "@huggingface/inference",
        "InferenceClientProviderApiError",
        "InferenceClientProviderApiError",
        retried=(503,),
    ),
    _ai_sdk("@ai-sdk/openai"),
    _ai_sdk("@ai-sdk/openai-compatible"),
    _ai_sdk("@ai-sdk/azure"),
    # It knows four numbers of dimensions, and Cohere's tasks only.
    _ai_sdk("@ai-sdk/cohere", dimensions=False, unknown_task=False),
    _ai_sdk("@ai-sdk/google", unknown_task=False),
    _openai("@langchain/openai"),
    _cohere("@langchain/cohere", unknown_task=False, dimensions=False, truncates=True),
    Client(
        "@langchain/google-genai",
        "GoogleGenerativeAIFetchError",
        "GoogleGenerativeAIFetchError",
        swallows=True,
        retried=(429, 503),
    ),
    # It repeats a request that was refused for good for more than a minute, in all six retries.
    _ollama("@langchain/ollama", fewest_retries=0, retried=(429, 503)),
]

PYTHON = [
    _openai("langchain-openai"),
    _openai("langchain-openai (Azure)"),
    # It repeats requests that were refused for good, too, after waiting for 4 seconds each time.
    _cohere(
        "langchain-cohere", unknown_task=False, dimensions=False, truncates=True, fewest_retries=1
    ),
    Client(
        "langchain-google-genai",
        "GoogleGenerativeAIError",
        "GoogleGenerativeAIError",
        unknown_task=False,
    ),
    _ollama("langchain-ollama", truncates=True),
    _openai("llama-index-embeddings-openai-like"),
    _cohere("llama-index-embeddings-cohere", unknown_task=False, dimensions=False),
    _ollama("llama-index-embeddings-ollama", dimensions=False, truncates=True),
    # These two do not look at the status of the response.
    Client(
        "llama-index-embeddings-text-embeddings-inference",
        "ValidationError",
        "ValidationError",
        sides=False,
        unknown_task=False,
        dimensions=False,
        hidden=ALL,
    ),
    Client(
        "chromadb (Hugging Face server)",
        "ValueError",
        "ValueError",
        sides=False,
        unknown_task=False,
        dimensions=False,
        hidden=ALL,
    ),
    _openai("haystack-ai (OpenAI)"),
    _cohere("cohere-haystack", unknown_task=False, dimensions=False),
    Client("google-genai-haystack", "ClientError", "ClientError", unknown_task=False),
    _ollama("ollama-haystack", truncates=True),
    # It sends dimensions for models that are called text-embedding-3 only.
    _openai("chromadb (OpenAI)", dimensions=False),
    _ollama("chromadb (Ollama)", dimensions=False, truncates=True),
    Client(
        "voyageai", "InvalidRequestError", "AuthenticationError", types=QUANTISED, hidden=(503,)
    ),
    # As chromadb's, but it raises an exception of its own.
    _openai("litellm (openai)", dimensions=False),
    _openai("litellm (jina_ai)", retries=False),
    _openai("litellm (voyage)", retries=False),
    _openai("litellm (infinity)", retries=False),
    _openai("litellm (cohere)", retries=False, truncates=True),
    _openai("litellm (gemini)", retries=False),
    _openai("litellm (ollama)", retries=False, truncates=True),
    _openai("litellm (azure)"),
]
