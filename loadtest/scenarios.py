"""What is asked: single queries, bulk ingestion, and everything mixed."""

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
"""A batch that clients commonly send; a large model on few cores wants a smaller one."""


@dataclass(frozen=True, slots=True)
class Request:
    """A POST to /v1/embeddings, ready to be sent; ``kind`` groups it in results."""

    kind: str
    texts: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


Fields = dict[str, Any]
"""Of a JSON body."""


def interactive(dice: random.Random) -> tuple[str, Fields, dict[str, str]]:
    """Somebody searches: one query, the vector as JSON numbers, which most clients ask for."""
    return "query", {"input": [some_text(QUERY, dice)], "task": "retrieval.query"}, {}


def bulk(dice: random.Random, size: int) -> tuple[str, Fields, dict[str, str]]:
    """Somebody fills an index: passages by the batch, of low priority, in base64."""
    texts = [some_text(PASSAGE, dice) for _ in range(size)]
    fields = {"input": texts, "task": "retrieval.passage", "encoding_format": "base64"}
    return "passages", fields, {"x-priority": "bulk"}


def mixed(dice: random.Random) -> tuple[str, Fields, dict[str, str]]:
    """All tasks, dimensions and output types in turn, raw bytes among them; up to 16 texts."""
    task = dice.choice(TASKS)
    lengths = QUERY if task == "retrieval.query" else PASSAGE
    texts = [some_text(lengths, dice) for _ in range(dice.choice([1, 1, 1, 4, 16]))]
    fields = {"input": texts, "task": task, "dimensions": dice.choice([64, 128, 256])}
    output = dice.choice([*TYPES, RAW])
    if output == RAW:
        return "raw", fields, {"accept": RAW}
    return output, fields | {"embedding_type": output}, {}


@dataclass(frozen=True, slots=True)
class Scenario:
    """One kind of load.

    Attributes:
        compose: the kind, fields and headers of a request.
        p99_ms: milliseconds within which 99 of 100 answers come while the server is half busy.
        clients: how many wait for answers where the capacity is sought: enough to fill batches.
    """

    compose: Callable[[random.Random], tuple[str, Fields, dict[str, str]]]
    p99_ms: float
    clients: int

    def requests(self, seed: int, model: str = "") -> Iterator[Request]:
        """Endless requests, for equal seeds the same.

        Args:
            seed: of lengths, words and choices.
            model: named in the request, which then names no task: what every server knows.
        """
        dice = random.Random(seed)
        while True:
            kind, fields, headers = self.compose(dice)
            if model:
                fields = {name: fields[name] for name in fields if name != "task"}
                fields["model"] = model
            yield Request(kind, len(fields["input"]), orjson.dumps(fields), headers)


def scenarios(bulk_texts: int = BULK_TEXTS) -> dict[str, Scenario]:
    """All scenarios by name; ``bulk_texts`` are in one request of bulk."""
    return {
        "interactive": Scenario(interactive, p99_ms=250.0, clients=64),
        "bulk": Scenario(partial(bulk, size=bulk_texts), p99_ms=5000.0, clients=8),
        "mixed": Scenario(mixed, p99_ms=1000.0, clients=32),
    }


def is_right(request: Request, content_type: str, body: bytes) -> bool:
    """Whether an answer holds a vector for each text."""
    if content_type.startswith(RAW):
        return len(body) > 0 and len(body) % request.texts == 0
    return body.count(b'"embedding":') == request.texts
