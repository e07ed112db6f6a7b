"""The one way from a job to its vectors; every dialect, the command line and the library use it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from taskvec.core.admission import Admission
from taskvec.core.job import Embeddings, EmbedJob, Timings
from taskvec.core.tasks import TaskTable
from taskvec.core.tokens import TextTokenizer
from taskvec.core.vectors import finish
from taskvec.engines.base import Engine, EngineResult, ModelCard, TokenBatch, TokenIds
from taskvec.errors import DeadlineExceededError
from taskvec.gather import gather_or_cancel

Charge = Callable[[int], Awaitable[None]]
"""Told how many tokens a request has, before they are embedded; raises where they are too many."""

FINISH_INLINE = 1 << 16
"""Up to so many values are finished in the event loop: less than a millisecond."""


class AsyncEmbedder:
    """Resolves, tokenises, admits, embeds and finishes."""

    def __init__(
        self, engine: Engine, tokenizer: TextTokenizer, tasks: TaskTable, admission: Admission
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._admission = admission
        self.tasks = tasks

    @property
    def model(self) -> ModelCard:
        """The served model."""
        return self._engine.model

    @property
    def max_tokens(self) -> int:
        """Longest text, special tokens included."""
        return self._tokenizer.max_tokens

    async def embed(self, job: EmbedJob, charge: Charge | None = None) -> Embeddings:
        """Embed a job's inputs.

        Args:
            job: what is wanted.
            charge: told of the tokens once they are known and admitted; what it raises ends the
                job before the engine sees it.

        Raises:
            InvalidRequestError: dimensions or a text that the model cannot take.
            QueueFullError: no room in the token budget.
            DeadlineExceededError: the job's deadline passed; its queued texts are dropped.
            UnavailableError: the engine cannot embed now.
        """
        (result,) = await self.embed_together([job], charge)
        return result

    async def embed_together(
        self, jobs: Sequence[EmbedJob], charge: Charge | None = None
    ) -> list[Embeddings]:
        """Embed the jobs of one request: admitted together, under the earliest deadline.

        Raises:
            TaskvecError: as ``embed``; if one fails, all do.
        """
        for job in jobs:
            job.check_dimensions(self.model.dimension)
        self._engine.health().require_ready()
        deadlines = [job.deadline for job in jobs if job.deadline is not None]
        if not deadlines:
            return await self._embed(jobs, charge)
        try:
            async with asyncio.timeout(min(deadlines) - time.monotonic()):
                return await self._embed(jobs, charge)
        except TimeoutError:
            raise DeadlineExceededError(
                "The request's deadline passed before it was embedded: send fewer texts at once, "
                "or allow more time."
            ) from None

    async def _embed(self, jobs: Sequence[EmbedJob], charge: Charge | None) -> list[Embeddings]:
        begun = time.monotonic()
        batches = [
            TokenBatch(await self._token_ids(job), job.task.adapter, job.deadline) for job in jobs
        ]
        tokenizing = time.monotonic() - begun
        tokens = sum(batch.tokens for batch in batches)
        with self._admission.admit(tokens):
            if charge is not None:
                await charge(tokens)
            if len(batches) == 1:
                results = [await self._engine.embed(batches[0])]
            else:
                results = await gather_or_cancel(map(self._engine.embed, batches))
        return [
            Embeddings(
                vectors=await self._finished(job, result),
                tokens=batch.tokens,
                timings=Timings(tokenizing, result.queued, result.computed),
            )
            for job, batch, result in zip(jobs, batches, results, strict=True)
        ]

    @staticmethod
    async def _finished(job: EmbedJob, result: EngineResult) -> NDArray[np.generic]:
        arguments = (result.vectors, job.dimensions, job.output)
        if result.vectors.size <= FINISH_INLINE:
            return finish(*arguments, normalized=job.normalized)
        return await asyncio.get_running_loop().run_in_executor(
            None, lambda: finish(*arguments, normalized=job.normalized)
        )

    async def _token_ids(self, job: EmbedJob) -> Sequence[TokenIds]:
        if isinstance(job.inputs[0], np.ndarray):
            return cast("Sequence[TokenIds]", job.inputs)
        texts = cast("Sequence[str]", job.inputs)
        return await self._tokenizer.encode(texts, prompt=job.task.prompt, truncate=job.truncate)
