"""What is evaluated: something that turns texts into vectors, by task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from taskvec.core.tasks import Task
from taskvec.evaluation.formats import Matrix

if TYPE_CHECKING:
    from taskvec.library import Embedder  # loads torch, which a service spares

BASE = "base"
"""What the backbone without an adapter is called."""

Advance = Callable[[int], None]
"""Told of each batch, how many texts were embedded."""

_QUERY, _PASSAGE = ".query", ".passage"
_TEXTS_AT_ONCE = 512


class Sides(NamedTuple):
    """The tasks that embed the two sides of a search; one task for both where there is no other.

    What is no search is embedded as a passage.
    """

    query: str
    passage: str


class Model(Protocol):
    """A checkpoint in this process, or a service.

    Attributes:
        name: what it is called.
        dimension: width of its vectors.
        matryoshka: dimensions that it was trained to be cut at; empty where unknown.
        tasks: names that ``embed`` takes.
    """

    name: str
    dimension: int
    matryoshka: Sequence[int]
    tasks: Sequence[str]

    def embed(self, texts: Sequence[str], task: str, advance: Advance) -> Matrix:
        """Embed texts, cut where they are too long.

        Returns:
            float32 [texts, dimension], as the engine gives them, not normalised.
        """
        ...


def sides_of(tasks: Sequence[str]) -> dict[str, Sides]:
    """Adapter -> the tasks of its two sides."""
    sides: dict[str, Sides] = {}
    for task in tasks:
        adapter = task.removesuffix(_QUERY).removesuffix(_PASSAGE)
        if adapter + _QUERY in tasks and adapter + _PASSAGE in tasks:
            sides[adapter] = Sides(adapter + _QUERY, adapter + _PASSAGE)
        else:
            sides[task] = Sides(task, task)
    return sides


class LoadedModel:
    """A checkpoint in this process, and its backbone alone as the task ``base``."""

    def __init__(self, embedder: Embedder) -> None:
        """Take a loaded model; whoever loaded it closes it."""
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
        """The backbone with the prompts of a search, where the model has such."""
        bare = {name: replace(task, adapter=None) for name, task in self._tasks.items()}
        searches = [name for name in bare if name.endswith((_QUERY, _PASSAGE))]
        if not searches:
            return {BASE: next(iter(bare.values()))}
        return {f"{BASE}.{name.rpartition('.')[2]}": bare[name] for name in searches}

    def embed(self, texts: Sequence[str], task: str, advance: Advance) -> Matrix:
        """See ``Model.embed``."""
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        for begin in range(0, len(texts), _TEXTS_AT_ONCE):
            piece = texts[begin : begin + _TEXTS_AT_ONCE]
            vectors[begin : begin + len(piece)] = self._embedder.embed(
                piece, self._tasks[task], normalized=False, truncate=True
            )
            advance(len(piece))
        return vectors
