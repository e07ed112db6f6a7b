"""The embedding routes of each API dialect: a request, its vectors, and the form of its errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from taskvec.api.tei import ERROR_TYPES

Message = Callable[[dict[str, Any]], str]


class DialectRoute(NamedTuple):
    """One route that embeds.

    Attributes:
        dialect: value of ``TASKVEC_DIALECTS`` and of the metrics' label.
        path: of the route.
        request: makes the body for texts.
        vectors: the float vectors of a response, or a list with the score of each document.
        message: checks the form of an error, and returns its message.
        field: the route's name of the texts in errors.
    """

    dialect: str
    path: str
    request: Callable[[list[str]], dict[str, Any]]
    vectors: Callable[[Any], list[list[float]]]
    message: Message
    field: str


def openai_message(body: dict[str, Any]) -> str:
    assert set(body) == {"error", "detail", "code", "request_id"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return str(body["detail"])


def cohere_message(body: dict[str, Any]) -> str:
    assert set(body) == {"id", "message"}
    return str(body["message"])


def rerank_message(body: dict[str, Any]) -> str:
    assert body["id"] == body["request_id"]
    assert body["message"].partition(" Retry after ")[0] == body["detail"]
    return openai_message({key: body[key] for key in body if key not in ("id", "message")})


def ollama_message(body: dict[str, Any]) -> str:
    assert set(body) == {"error"}
    assert isinstance(body["error"], str)
    return body["error"]


def tei_message(body: dict[str, Any]) -> str:
    assert set(body) == {"error", "error_type"}
    assert body["error_type"] in ERROR_TYPES
    return str(body["error"])


def gemini_message(body: dict[str, Any]) -> str:
    assert set(body) == {"error"}
    assert set(body["error"]) == {"code", "message", "status"}
    assert body["error"]["status"].isupper()
    return str(body["error"]["message"])


OPENAI = DialectRoute(
    "openai",
    "/v1/embeddings",
    lambda texts: {"input": texts},
    lambda body: [entry["embedding"] for entry in body["data"]],
    openai_message,
    "input",
)

OTHERS = [
    OPENAI._replace(path="/embeddings"),
    OPENAI._replace(dialect="azure", path="/openai/v1/embeddings"),
    OPENAI._replace(dialect="azure", path="/openai/deployments/taskvec-mini/embeddings"),
    OPENAI._replace(dialect="azure", path="/v1/deployments/taskvec-mini/embeddings"),
    DialectRoute(
        "cohere",
        "/v2/embed",
        lambda texts: {"texts": texts, "input_type": "search_query", "truncate": "NONE"},
        lambda body: body["embeddings"]["float"],
        cohere_message,
        "texts",
    ),
    DialectRoute(
        "cohere",
        "/v1/embed",
        lambda texts: {"texts": texts, "truncate": "NONE"},
        lambda body: body["embeddings"],
        cohere_message,
        "texts",
    ),
    DialectRoute(
        "ollama",
        "/api/embed",
        lambda texts: {"model": "taskvec-mini", "input": texts, "truncate": False},
        lambda body: body["embeddings"],
        ollama_message,
        "input",
    ),
    *(
        DialectRoute(
            "tei", path, lambda texts: {"inputs": texts}, lambda body: body, tei_message, "inputs"
        )
        for path in ("/embed", "/")
    ),
    *(
        DialectRoute(
            "gemini",
            f"{prefix}/models/taskvec-mini:batchEmbedContents",
            lambda texts: {"requests": [{"content": {"parts": [{"text": t}]}} for t in texts]},
            lambda body: [entry["values"] for entry in body["embeddings"]],
            gemini_message,
            "requests",
        )
        for prefix in ("/v1beta", "/v1", "")
    ),
]

RANKED = [
    DialectRoute(
        "rerank",
        "/v1/rerank",
        lambda texts: {"query": "q", "documents": texts, "truncate": False},
        lambda body: [[entry["relevance_score"]] for entry in body["results"]],
        rerank_message,
        "documents",
    ),
    DialectRoute(
        "cohere",
        "/v2/rerank",
        lambda texts: {"query": "q", "documents": texts, "truncate": "NONE"},
        lambda body: [[entry["relevance_score"]] for entry in body["results"]],
        cohere_message,
        "documents",
    ),
    DialectRoute(
        "tei",
        "/rerank",
        lambda texts: {"query": "q", "texts": texts},
        lambda body: [[entry["score"]] for entry in body],
        tei_message,
        "texts",
    ),
    *(
        DialectRoute(
            "rerank",
            path,
            lambda texts: {"text_1": "q", "text_2": texts},
            lambda body: [[entry["score"]] for entry in body["data"]],
            rerank_message,
            "text_2",
        )
        for path in ("/v1/score", "/score")
    ),
]
"""Routes that embed a query and documents, and answer scores."""

ROUTES = [OPENAI, *OTHERS, *RANKED]
