"""Kinds of load: single queries, bulk ingestion, and a mix of everything."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import orjson

from lengths import PASSAGE, QUERY, some_text

TASKS = ["retrieval.query", "retrieval.passage", "text-matching", "clustering", "classification"]
TYPES = ["float", "base64", "int8", "uint8", "binary", "ubinary"]
RAW = "application/octet-stream"
BULK_TEXTS = 32
"""Texts in a bulk request, a common batch size; use fewer for a large model on few cores."""


@dataclass(frozen=True, slots=True)
class Request:
    """A prepared POST to /v1/embeddings; ``kind`` groups results."""

    kind: str
    texts: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


Fields = dict[str, Any]
"""Fields of a JSON body."""


def interactive(rng: random.Random) -> tuple[str, Fields, dict[str, str]]:
    """Return a search: one query, the vector as JSON numbers, which is what most clients use."""
    return "query", {"input": [some_text(QUERY, rng)], "task": "retrieval.query"}, {}


def bulk(rng: random.Random, size: int) -> tuple[str, Fields, dict[str, str]]:
    """Return a request that fills an index: many passages, bulk priority, base64."""
    texts = [some_text(PASSAGE, rng) for _ in range(size)]
    fields = {"input": texts, "task": "retrieval.passage", "encoding_format": "base64"}
    return "passages", fields, {"x-priority": "bulk"}


def mixed(rng: random.Random) -> tuple[str, Fields, dict[str, str]]:
    """Return a request with a random task, dimensions and output type, and up to 16 texts."""
    task = rng.choice(TASKS)
    lengths = QUERY if task == "retrieval.query" else PASSAGE
    texts = [some_text(lengths, rng) for _ in range(rng.choice([1, 1, 1, 4, 16]))]
    fields = {"input": texts, "task": task, "dimensions": rng.choice([64, 128, 256])}
    output = rng.choice([*TYPES, RAW])
    if output == RAW:
        return "raw", fields, {"accept": RAW}
    return output, fields | {"embedding_type": output}, {}


@dataclass(frozen=True, slots=True)
class Scenario:
    """One kind of load.

    Attributes:
        compose: returns the kind, fields and headers of a request.
        p99_ms: maximum 99th percentile in milliseconds up to half of the capacity.
        clients: clients of the closed loop that measures the capacity; enough to fill batches.
    """

    compose: Callable[[random.Random], tuple[str, Fields, dict[str, str]]]
    p99_ms: float
    clients: int

    def requests(self, seed: int, model: str = "") -> Iterator[Request]:
        """Yield requests without end; the same seed gives the same requests.

        Args:
            seed: seed of lengths, words and choices.
            model: model to name in each request, instead of a task, for servers without tasks.
        """
        rng = random.Random(seed)
        while True:
            kind, fields, headers = self.compose(rng)
            if model:
                fields = {name: fields[name] for name in fields if name != "task"}
                fields["model"] = model
            yield Request(kind, len(fields["input"]), orjson.dumps(fields), headers)


def scenarios(bulk_texts: int = BULK_TEXTS) -> dict[str, Scenario]:
    """Return all scenarios by name; ``bulk_texts`` is the number of texts in a bulk request."""
    return {
        "interactive": Scenario(interactive, p99_ms=250.0, clients=64),
        "bulk": Scenario(partial(bulk, size=bulk_texts), p99_ms=5000.0, clients=8),
        "mixed": Scenario(mixed, p99_ms=1000.0, clients=32),
    }


def is_complete(request: Request, content_type: str, body: bytes) -> bool:
    """Return whether a response has a vector for each text."""
    if content_type.startswith(RAW):
        return len(body) > 0 and len(body) % request.texts == 0
    return body.count(b'"embedding":') == request.texts
