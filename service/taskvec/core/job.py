"""Embedding jobs: what one request asks of the engine, whatever API dialect it arrived in."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from taskvec.core.memory_budget import MemoryHold
from taskvec.core.tasks import MIXED_TASKS, Task
from taskvec.engines.base import TokenIds
from taskvec.priority import Priority
from taskvec.telemetry.stages import Stages

Charge = Callable[[int], Awaitable[None]]
"""Charge a number of tokens to whoever sent the request; raises a TaskvecError if refused."""

TextName = Callable[[int], str]
"""Return the client's name of the text at an index, for errors."""


def listed(field: str) -> TextName:
    """Return the names of the texts in a list, such as ``texts[3]``."""
    return lambda index: f"{field}[{index}]"


_INPUT = listed("input")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class EmbedJob:
    """Texts or token ids to embed with one task.

    Attributes:
        inputs: non-empty strings, or int32 token-id arrays [length], which are embedded as given.
        task: adapter and prompt of the inputs; the default if ``tasks`` is given.
        tasks: task of each input, if they have several; None if all have ``task``.
        truncate: truncate texts that exceed the model's limit; if False, refuse them.
        deadline: ``time.monotonic()`` after which the answer is no longer needed; None if never.
        priority: priority class requested; large jobs are bulk regardless (``Admission``).
        tenant: name of the API key, None without one. Cached vectors belong to one tenant.
        indices: index in the request of each input, for errors; None if the job has all inputs.
        text_name: the client's names of ``inputs``, for errors.
        truncation: what the client sends to have texts truncated, for errors.
    """

    inputs: Sequence[str] | Sequence[TokenIds]
    task: Task
    tasks: Sequence[Task] | None = None
    truncate: bool = False
    deadline: float | None = None
    priority: Priority = Priority.INTERACTIVE
    tenant: str | None = None
    indices: Sequence[int] | None = None
    text_name: TextName = _INPUT
    truncation: str = "truncate: true"

    @property
    def input_bytes(self) -> int:
        """Estimate of the memory of texts and token ids: a token id of 4 bytes per 4 characters."""
        if isinstance(self.inputs[0], str):
            return sum(map(sys.getsizeof, self.inputs)) + sum(map(len, self.inputs))
        return sum(map(sys.getsizeof, self.inputs))

    @property
    def task_name(self) -> str:
        """Name of the task for metrics and logs."""
        return self.task.name if self.tasks is None else MIXED_TASKS

    def by_task(self) -> list[EmbedJob]:
        """Return one job for each task, with the indices of its inputs; the job itself if one."""
        if self.tasks is None:
            return [self]
        indices: dict[Task, list[int]] = {}
        for i, task in enumerate(self.tasks):
            indices.setdefault(task, []).append(i)
        inputs: Sequence[Any] = self.inputs
        return [
            replace(self, inputs=[inputs[i] for i in chosen], task=task, tasks=None, indices=chosen)
            for task, chosen in indices.items()
        ]


@dataclass(slots=True, kw_only=True)
class JobContext:
    """State of one request while its jobs run: elapsed stages, token charge, memory.

    Attributes:
        stages: time spent in each stage, also for a request that fails.
        charge: called once with the number of tokens to embed, after admission and before the
            engine; None if there is no token limit.
        memory: what the request holds of the process's memory budget; None if it is not counted.
        input_bytes: what it holds for texts and token ids; 0 if they are too few to be counted.
    """

    stages: Stages = field(default_factory=Stages)
    charge: Charge | None = None
    memory: MemoryHold | None = None
    input_bytes: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Embeddings:
    """Result of a job.

    Attributes:
        vectors: float32 [texts, hidden size], not normalised.
        tokens: tokens embedded, including prompt and special tokens, excluding truncated ones.
    """

    vectors: NDArray[np.float32]
    tokens: int
