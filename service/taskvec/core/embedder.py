"""The one way from a job to its vectors; every dialect, the command line and the library use it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from typing import cast

import numpy as np
from numpy.typing import NDArray

from taskvec.cache.embeddings import EmbeddingCache
from taskvec.checkpoint.backbone import ModelCard
from taskvec.concurrency import CancelScope, gather_or_cancel
from taskvec.core.admission import Admission
from taskvec.core.health import ServiceHealth
from taskvec.core.job import Embeddings, EmbedJob
from taskvec.core.postprocess import finish
from taskvec.core.tasks import TaskTable
from taskvec.core.tokenizer import TextTokenizer
from taskvec.engines.base import Engine, EngineResult, TokenBatch, TokenIds
from taskvec.errors import DeadlineExceededError
from taskvec.telemetry.stages import Stages

Charge = Callable[[int], Awaitable[None]]
"""Told how many tokens a request has, before they are embedded; raises where they are too many."""

FINISH_INLINE = 1 << 16
"""Up to so many values are finished in the event loop: less than a millisecond."""


class AsyncEmbedder:
    """Tokenises, recalls, admits, embeds and finishes."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: TextTokenizer,
        tasks: TaskTable,
        admission: Admission,
        health: ServiceHealth,
        *,
        cache: EmbeddingCache | None = None,
    ) -> None:
        """Wire the parts; without a cache every text is embedded."""
        self._engine = engine
        self._tokenizer = tokenizer
        self._admission = admission
        self._health = health
        self._cache = cache
        self.tasks = tasks

    @property
    def model(self) -> ModelCard:
        """The served model."""
        return self._engine.model

    @property
    def max_tokens(self) -> int:
        """Longest text, special tokens included."""
        return self._tokenizer.max_tokens

    @property
    def work(self) -> AbstractContextManager[None]:
        """Around a whole request; see ``ServiceHealth``."""
        return self._health.work

    async def close(self) -> None:
        """Let go of the tokenizer's threads and of the cache, once nothing is embedded any more."""
        if self._cache is not None:
            await self._cache.close()
        self._tokenizer.close()

    def cut(self, ids: list[int]) -> list[int]:
        """The first ``max_tokens`` ids of a longer list."""
        return self._tokenizer.cut(ids)

    async def embed(
        self, job: EmbedJob, stages: Stages | None = None, charge: Charge | None = None
    ) -> Embeddings:
        """Embed a job's inputs.

        Args:
            job: what is wanted.
            stages: where the time is noted, also of a job that fails; encoding has begun when
                this returns.
            charge: told of the tokens once they are known and admitted; what it raises ends the
                job before the engine sees it.

        Raises:
            InvalidRequestError: dimensions or a text that the model cannot take.
            QueueFullError: no room in the token budget.
            DeadlineExceededError: the job's deadline passed; its queued texts are dropped.
            UnavailableError: the engine cannot embed now.
        """
        (result,) = await self.embed_together([job], stages, charge)
        return result

    async def embed_together(
        self,
        jobs: Sequence[EmbedJob],
        stages: Stages | None = None,
        charge: Charge | None = None,
    ) -> list[Embeddings]:
        """Embed the jobs of one request: admitted together, under the earliest deadline.

        Args:
            jobs: at least one.
            stages: see ``embed``.
            charge: see ``embed``.

        Raises:
            TaskvecError: as ``embed``; if one fails, all do.
        """
        for job in jobs:
            job.check_dimensions(self.model.dimension)
        self._health.require_engine()
        self._admission.require_room(jobs[0].priority)
        stages = stages or Stages()
        deadlines = [job.deadline for job in jobs if job.deadline is not None]
        seconds = min(deadlines) - time.monotonic() if deadlines else None
        with CancelScope(_too_late, seconds):
            return await self._embed(jobs, stages, charge)

    async def _embed(
        self, jobs: Sequence[EmbedJob], stages: Stages, charge: Charge | None
    ) -> list[Embeddings]:
        stages.begin("tokenize")
        ids = [await self._token_ids(job) for job in jobs]
        stages.end()
        if self._cache is None:
            results = await self._run(ids, jobs, stages, charge)
            rows = [result.vectors for result in results]
        else:
            rows = await self._recalled(self._cache, ids, jobs, stages, charge)
        stages.begin("encode")
        return [
            Embeddings(vectors=await self._finished(job, vectors), tokens=_tokens(texts))
            for job, vectors, texts in zip(jobs, rows, ids, strict=True)
        ]

    async def _recalled(
        self,
        cache: EmbeddingCache,
        ids: Sequence[Sequence[TokenIds]],
        jobs: Sequence[EmbedJob],
        stages: Stages,
        charge: Charge | None,
    ) -> list[NDArray[np.float32]]:
        """The vectors of each job; only what the cache does not know is embedded."""
        stages.begin("cache")
        recalls = [
            await cache.recall(texts, job.task.adapter, job.owner)
            for texts, job in zip(ids, jobs, strict=True)
        ]
        stages.end()
        gaps = [place for place, recall in enumerate(recalls) if recall.unknown]
        if gaps:
            results = await self._run(
                [[ids[place][text] for text in recalls[place].unknown] for place in gaps],
                [jobs[place] for place in gaps],
                stages,
                charge,
            )
            for place, result in zip(gaps, results, strict=True):
                recalls[place].vectors[recalls[place].unknown] = result.vectors
                cache.keep(recalls[place])
        return [recall.vectors for recall in recalls]

    async def _run(
        self,
        ids: Sequence[Sequence[TokenIds]],
        jobs: Sequence[EmbedJob],
        stages: Stages,
        charge: Charge | None,
    ) -> list[EngineResult]:
        """What the engine makes of each job's texts, once they are admitted."""
        tokens = sum(map(_tokens, ids))
        priority = self._admission.class_of(tokens, jobs[0].priority)
        batches = [
            TokenBatch(texts, job.task.adapter, job.deadline, priority, stages.entered)
            for texts, job in zip(ids, jobs, strict=True)
        ]
        with self._admission.admit(tokens, priority):
            if charge is not None:
                await charge(tokens)
            stages.begin("queue")
            with self._health.waiting:
                if len(batches) == 1:
                    results = [await self._engine.embed(batches[0])]
                else:
                    results = await gather_or_cancel(map(self._engine.embed, batches))
        queued = min(result.queued for result in results)
        whole = max(result.queued + result.computed for result in results)
        stages.embedded(queued, whole - queued)
        return results

    @staticmethod
    async def _finished(job: EmbedJob, vectors: NDArray[np.float32]) -> NDArray[np.generic]:
        arguments = (vectors, job.dimensions, job.output)
        if vectors.size <= FINISH_INLINE:
            return finish(*arguments, normalized=job.normalized)
        return await asyncio.get_running_loop().run_in_executor(
            None, lambda: finish(*arguments, normalized=job.normalized)
        )

    async def _token_ids(self, job: EmbedJob) -> Sequence[TokenIds]:
        if isinstance(job.inputs[0], np.ndarray):
            return cast("Sequence[TokenIds]", job.inputs)
        texts = cast("Sequence[str]", job.inputs)
        return await self._tokenizer.encode(texts, prompt=job.task.prompt, truncate=job.truncate)


def _too_late() -> DeadlineExceededError:
    return DeadlineExceededError(
        "The request's deadline passed before it was embedded: send fewer texts at once, or allow "
        "more time."
    )


def _tokens(texts: Sequence[TokenIds]) -> int:
    return sum(map(len, texts))
