"""The one way from a job to its vectors; every dialect, the command line and the library use it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import cast

import numpy as np

from taskvec.core.admission import Admission
from taskvec.core.job import Embeddings, EmbedJob, Timings
from taskvec.core.tasks import TaskTable
from taskvec.core.tokens import TextTokenizer
from taskvec.core.vectors import finish
from taskvec.engines.base import Engine, ModelCard, TokenBatch, TokenIds
from taskvec.errors import DeadlineExceededError

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

    async def embed(self, job: EmbedJob) -> Embeddings:
        """Embed a job's inputs.

        Raises:
            InvalidRequestError: dimensions or a text that the model cannot take.
            QueueFullError: no room in the token budget.
            DeadlineExceededError: the job's deadline passed; its queued texts are dropped.
            UnavailableError: the engine cannot embed now.
        """
        job.check_dimensions(self.model.dimension)
        self._engine.health().require_ready()
        if job.deadline is None:
            return await self._embed(job)
        try:
            async with asyncio.timeout(job.deadline - time.monotonic()):
                return await self._embed(job)
        except TimeoutError:
            raise DeadlineExceededError(
                "The request's deadline passed before it was embedded: send fewer texts at once, "
                "or allow more time."
            ) from None

    async def _embed(self, job: EmbedJob) -> Embeddings:
        begun = time.monotonic()
        ids = await self._token_ids(job)
        tokenized = time.monotonic()
        batch = TokenBatch(ids=ids, adapter=job.task.adapter, deadline=job.deadline)
        tokens = batch.tokens
        with self._admission.admit(tokens):
            result = await self._engine.embed(batch)
        arguments = (result.vectors, job.dimensions, job.output)
        if result.vectors.size <= FINISH_INLINE:
            vectors = finish(*arguments, normalized=job.normalized)
        else:
            vectors = await asyncio.get_running_loop().run_in_executor(
                None, lambda: finish(*arguments, normalized=job.normalized)
            )
        return Embeddings(
            vectors=vectors,
            tokens=tokens,
            timings=Timings(tokenized - begun, result.queued, result.computed),
        )

    async def _token_ids(self, job: EmbedJob) -> Sequence[TokenIds]:
        if isinstance(job.inputs[0], np.ndarray):
            return cast("Sequence[TokenIds]", job.inputs)
        texts = cast("Sequence[str]", job.inputs)
        return await self._tokenizer.encode(texts, prompt=job.task.prompt, truncate=job.truncate)
