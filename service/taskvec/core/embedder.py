"""Run jobs: tokenise, look up the cache, admit, embed; for every API dialect and the library."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import cast

import numpy as np
import structlog
from numpy.typing import NDArray

from taskvec.cache.embeddings import EmbeddingCache
from taskvec.checkpoint.backbone import ModelCard
from taskvec.concurrency import CancelScope, gather_or_cancel
from taskvec.core.admission import Admission, batch_priority
from taskvec.core.health import ServiceHealth
from taskvec.core.job import Embeddings, EmbedJob, JobContext
from taskvec.core.tasks import TaskTable
from taskvec.core.token_spans import TokenSpans, token_spans
from taskvec.core.tokenizer import TextTokenizer
from taskvec.engines.base import Engine, EngineResult, TokenBatch, TokenIds
from taskvec.errors import DeadlineExceededError, TaskvecError
from taskvec.priority import Priority

CHARACTERS_PER_TOKEN = 4
"""Estimate for the class of a request that is not tokenised yet."""


class AsyncEmbedder:
    """Embeds jobs with one engine; belongs to one event loop.

    Attributes:
        tasks: tasks that the checkpoint offers.
    """

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
        """Connect the parts; without a cache every text is embedded."""
        self._engine = engine
        self._tokenizer = tokenizer
        self._admission = admission
        self._health = health
        self._cache = cache
        self.tasks = tasks

    @property
    def model(self) -> ModelCard:
        """Card of the served model."""
        return self._engine.model

    @property
    def max_tokens(self) -> int:
        """Maximum tokens of a text, special tokens included."""
        return self._tokenizer.max_tokens

    async def close(self) -> None:
        """Close the tokenizer's threads and the cache; call it when no job is running."""
        if self._cache is not None:
            await self._cache.close()
        self._tokenizer.close()

    def truncate(self, ids: list[int]) -> list[int]:
        """Return the first ``max_tokens`` ids of a longer list, and count the truncation."""
        return self._tokenizer.truncate(ids)

    def special_tokens(self) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
        """Return the special tokens before and after a text: the id of each, and its name."""
        return self._tokenizer.special_tokens()

    async def tokenize(
        self,
        texts: Sequence[str],
        prompt: str,
        *,
        deadline: float,
        priority: Priority,
        context: JobContext,
    ) -> list[TokenSpans]:
        """Return the tokens of whole texts; nothing is embedded.

        Args:
            texts: any strings.
            prompt: put before each text.
            deadline: ``time.monotonic()`` after which the answer is no longer needed.
            priority: priority class requested; many characters are bulk regardless.
            context: records the stage.

        Raises:
            InvalidRequestError: see ``token_spans``.
            QueueFullError: too many characters wait for the tokenizer.
            DeadlineExceededError: the deadline passed.
        """
        context.stages.start("tokenize")
        tokens = sum(map(len, texts)) // CHARACTERS_PER_TOKEN
        priority = self._admission.priority_of(tokens, priority)
        with CancelScope(_tokenized_too_late, deadline - time.monotonic()):
            found = await token_spans(self._tokenizer, texts, prompt, priority)
        context.stages.end()
        return found

    async def embed(self, job: EmbedJob, context: JobContext | None = None) -> Embeddings:
        """Embed the inputs of one job.

        Args:
            job: inputs and task.
            context: records stages and charges tokens; None for neither.

        Raises:
            InvalidRequestError: a text is too long, or the tokenizer cannot encode it.
            QueueFullError: the token or request budget is used up, or too many characters wait for
                the tokenizer.
            DeadlineExceededError: the deadline passed; queued texts are dropped.
            UnavailableError: the engine cannot embed now.
            TaskvecError: the token charge was refused.
        """
        if job.tasks is None:
            (result,) = await self.embed_all([job], context)
            return result
        jobs = job.by_task()
        results = await self.embed_all(jobs, context, one_class=True)
        vectors = np.empty((len(job.inputs), self.model.dimension), dtype=np.float32)
        for part, result in zip(jobs, results, strict=True):
            vectors[part.indices] = result.vectors
        return Embeddings(vectors, sum(result.tokens for result in results))

    async def embed_all(
        self,
        jobs: Sequence[EmbedJob],
        context: JobContext | None = None,
        *,
        one_class: bool = False,
    ) -> list[Embeddings]:
        """Embed the jobs of one request: admitted together, under the earliest deadline.

        Args:
            jobs: at least one; all of the same priority.
            context: see ``embed``.
            one_class: the engine schedules all jobs in the class of their tokens together; False if
                each job has its own.

        Raises:
            TaskvecError: as ``embed``; if one job fails, all fail.
        """
        self._health.require_engine()
        self._admission.require_room(jobs[0].priority)
        deadlines = [job.deadline for job in jobs if job.deadline is not None]
        seconds = min(deadlines) - time.monotonic() if deadlines else None
        with CancelScope(_deadline_exceeded, seconds):
            return await self._embed(jobs, context or JobContext(), one_class=one_class)

    async def _embed(
        self, jobs: Sequence[EmbedJob], context: JobContext, *, one_class: bool
    ) -> list[Embeddings]:
        context.stages.start("tokenize")
        ids = [await self._token_ids(job) for job in jobs]
        context.stages.end()
        if context.input_bytes and context.memory is not None:
            more = sum(map(_bytes_beyond_estimate, jobs, ids))
            context.memory.resize(context.memory.bytes + more)
        indices = [job.indices or range(len(job.inputs)) for job in jobs]
        if self._cache is None:
            results = await self._run(ids, jobs, indices, context, one_class=one_class)
            rows = [result.vectors for result in results]
        else:
            rows = await self._embed_missing(
                self._cache, ids, jobs, indices, context, one_class=one_class
            )
        return [
            Embeddings(vectors=vectors, tokens=_count_tokens(texts))
            for vectors, texts in zip(rows, ids, strict=True)
        ]

    async def _embed_missing(
        self,
        cache: EmbeddingCache,
        ids: Sequence[Sequence[TokenIds]],
        jobs: Sequence[EmbedJob],
        indices: Sequence[Sequence[int]],
        context: JobContext,
        *,
        one_class: bool,
    ) -> list[NDArray[np.float32]]:
        """Return the vectors of each job; only texts that are not cached are embedded."""
        context.stages.start("cache")
        lookups = [
            await cache.lookup(texts, job.task.adapter, job.tenant)
            for texts, job in zip(ids, jobs, strict=True)
        ]
        context.stages.end()
        incomplete = [i for i, lookup in enumerate(lookups) if lookup.missing]
        if incomplete:
            results = await self._run(
                [[ids[i][text] for text in lookups[i].missing] for i in incomplete],
                [jobs[i] for i in incomplete],
                [[indices[i][text] for text in lookups[i].missing] for i in incomplete],
                context,
                one_class=one_class,
            )
            for i, result in zip(incomplete, results, strict=True):
                lookups[i].vectors[lookups[i].missing] = result.vectors
                cache.store(lookups[i])
        return [lookup.vectors for lookup in lookups]

    async def _run(
        self,
        ids: Sequence[Sequence[TokenIds]],
        jobs: Sequence[EmbedJob],
        indices: Sequence[Sequence[int]],
        context: JobContext,
        *,
        one_class: bool,
    ) -> list[EngineResult]:
        """Admit each job's texts and embed them; one engine result per job.

        Args:
            ids: the token ids of each text of each job.
            jobs: the jobs.
            indices: the index in the request of each of these texts.
            context: see ``embed``.
            one_class: see ``embed_all``.
        """
        stages = context.stages
        tokens = sum(map(_count_tokens, ids))
        priority = self._admission.priority_of(tokens, jobs[0].priority)
        batches = [
            TokenBatch(
                texts,
                job.task.adapter,
                job.deadline,
                batch_priority(
                    tokens if one_class else _count_tokens(texts),
                    priority,
                    self._engine.batch_tokens,
                ),
                stages.engine_entered,
            )
            for texts, job in zip(ids, jobs, strict=True)
        ]
        with self._admission.admit(tokens, priority):
            if context.charge is not None:
                await context.charge(tokens)
            stages.start("queue")
            with self._health.waiting:
                if len(batches) == 1:
                    results = [await self._embed_batch(batches[0], indices[0])]
                else:
                    results = await gather_or_cancel(map(self._embed_batch, batches, indices))
        queued = min(result.queued for result in results)
        total = max(result.queued + result.computed for result in results)
        stages.engine_finished(queued, total - queued)
        for result, texts in zip(results, indices, strict=True):
            _require_finite(result.vectors, texts)
        return results

    async def _embed_batch(self, batch: TokenBatch, indices: Sequence[int]) -> EngineResult:
        try:
            return await self._engine.embed(batch)
        except TaskvecError as error:
            raise error.renumbered(indices) from None

    async def _token_ids(self, job: EmbedJob) -> Sequence[TokenIds]:
        if isinstance(job.inputs[0], np.ndarray):
            return cast("Sequence[TokenIds]", job.inputs)
        texts = cast("Sequence[str]", job.inputs)
        tokens = sum(map(len, texts)) // CHARACTERS_PER_TOKEN
        try:
            return await self._tokenizer.encode(
                texts,
                prompt=job.task.prompt,
                truncate=job.truncate,
                priority=self._admission.priority_of(tokens, job.priority),
            )
        except TaskvecError as error:
            if job.indices is None:
                raise
            raise error.renumbered(job.indices) from None


MAX_NAMED_TEXTS = 100
"""Most texts that a log line lists."""

log = structlog.get_logger(__name__)


def _require_finite(vectors: NDArray[np.float32], texts: Sequence[int]) -> None:
    """Refuse vectors that are not finite, and name the first text that has one.

    A checkpoint may have a damaged row that only some texts use.

    Args:
        vectors: float32 [n, hidden size].
        texts: the place of each in the request.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        finite = np.isfinite(np.vecdot(vectors, vectors))
    if finite.all():
        return
    wrong = [texts[i] for i in np.flatnonzero(~finite).tolist()]
    where = f"input[{wrong[0]}]"
    log.error("vectors_not_finite", texts=wrong[:MAX_NAMED_TEXTS], of=len(wrong))
    more = f", nor of {len(wrong) - 1} others" if len(wrong) > 1 else ""
    raise TaskvecError(
        f"The model gives no usable vector of {where}{more}: it has values that are not finite. "
        "Leave the text out, and tell the operator, whose checkpoint may be damaged.",
        code="vector_not_finite",
        param=where,
    )


def _deadline_exceeded() -> DeadlineExceededError:
    return DeadlineExceededError(
        "The request's deadline passed before it was embedded: send fewer texts at once, or allow "
        "more time."
    )


def _tokenized_too_late() -> DeadlineExceededError:
    return DeadlineExceededError(
        "The request's deadline passed before its texts were tokenised: send fewer at once, or "
        "allow more time."
    )


def _bytes_beyond_estimate(job: EmbedJob, ids: Sequence[TokenIds]) -> int:
    """Return by how much the token ids of texts exceed what ``EmbedJob.input_bytes`` has."""
    if not isinstance(job.inputs[0], str):
        return 0
    return max(0, 4 * _count_tokens(ids) - sum(map(len, job.inputs)))


def _count_tokens(texts: Sequence[TokenIds]) -> int:
    return sum(map(len, texts))
