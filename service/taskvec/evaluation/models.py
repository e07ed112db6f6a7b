"""Models under evaluation: the protocol, and a checkpoint loaded in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from taskvec.core.tasks import Task
from taskvec.evaluation.formats import Matrix

if TYPE_CHECKING:
    from taskvec.library import Embedder  # loads torch, which a served model does not need

BASE = "base"
"""Task name of the backbone without an adapter."""

Advance = Callable[[int], None]
"""Called after each batch with the number of texts embedded."""

_QUERY, _PASSAGE = ".query", ".passage"
_CHUNK_TEXTS = 512
"""Texts between two progress reports."""


class Sides(NamedTuple):
    """The tasks of one adapter for queries and passages; the same task if it has only one.

    Texts of data other than retrieval are embedded as passages.
    """

    query: str
    passage: str


class Model(Protocol):
    """A model under evaluation.

    Attributes:
        name: its name in reports.
        dimension: dimensions of its vectors.
        matryoshka: dimensions that it was trained to be truncated to; empty if unknown.
        tasks: task names that ``embed`` accepts.
    """

    name: str
    dimension: int
    matryoshka: Sequence[int]
    tasks: Sequence[str]

    def embed(self, texts: Sequence[str], task: str, advance: Advance) -> Matrix:
        """Embed texts; texts that are too long are truncated.

        Args:
            texts: to embed.
            task: one of ``tasks``.
            advance: called with the number of texts done, after each batch.

        Returns:
            float32 [texts, dimension], not normalised.
        """
        ...


def sides_of(tasks: Sequence[str]) -> dict[str, Sides]:
    """Group tasks by adapter: adapter -> its tasks for queries and passages."""
    sides: dict[str, Sides] = {}
    for task in tasks:
        adapter = task.removesuffix(_QUERY).removesuffix(_PASSAGE)
        if adapter + _QUERY in tasks and adapter + _PASSAGE in tasks:
            sides[adapter] = Sides(adapter + _QUERY, adapter + _PASSAGE)
        else:
            sides[task] = Sides(task, task)
    return sides


class LoadedModel:
    """A checkpoint in this process; its backbone without an adapter is the task ``base``."""

    def __init__(self, embedder: Embedder) -> None:
        """Wrap a loaded model; the caller closes it."""
        card = embedder.model
        self.name = card.name
        self.dimension = card.dimension
        self.matryoshka: Sequence[int] = card.matryoshka
        self._embedder = embedder
        self._tasks = {name: embedder.task(name) for name in embedder.tasks}
        if card.adapters and BASE not in card.adapters:
            self._tasks |= self._base()
        self.tasks: Sequence[str] = list(self._tasks)

    def _base(self) -> dict[str, Task]:
        """Return the tasks of the backbone, with the retrieval prompts if the model has them."""
        bare = {name: replace(task, adapter=None) for name, task in self._tasks.items()}
        searches = [name for name in bare if name.endswith((_QUERY, _PASSAGE))]
        if not searches:
            return {BASE: next(iter(bare.values()))}
        return {f"{BASE}.{name.rpartition('.')[2]}": bare[name] for name in searches}

    def embed(self, texts: Sequence[str], task: str, advance: Advance) -> Matrix:
        """See ``Model.embed``."""
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        for start in range(0, len(texts), _CHUNK_TEXTS):
            chunk = texts[start : start + _CHUNK_TEXTS]
            vectors[start : start + len(chunk)] = self._embedder.embed(
                chunk, self._tasks[task], normalized=False, truncate=True
            )
            advance(len(chunk))
        return vectors
