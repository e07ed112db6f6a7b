"""POST /v1/engine/embed: the texts of other taskvec gateways, already tokenised, adapters mixed."""

from __future__ import annotations

import time

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from taskvec.api.context import RequestContext, context_of
from taskvec.api.request import (
    RequestLimits,
    cancel_on_disconnect,
    header_dict,
    read_bytes,
    request_priority,
    request_timeout,
)
from taskvec.core.embedder import AsyncEmbedder
from taskvec.core.job import EmbedJob
from taskvec.core.tasks import Task
from taskvec.engines.base import TokenIds
from taskvec.engines.wire import ADAPTERS_HEADER, WIRE_TYPE, unpack_texts
from taskvec.errors import InvalidRequestError, UnsupportedMediaTypeError
from taskvec.priority import Priority


class EngineRoute:
    """Unpacks texts, embeds those of one adapter as one job, packs the vectors."""

    def __init__(self, embedder: AsyncEmbedder, limits: RequestLimits) -> None:
        self._embedder = embedder
        self._limits = limits
        self._tasks: dict[str | None, Task] = {task.adapter: task for task in embedder.tasks}

    async def __call__(self, request: Request) -> Response:
        """Answer one call; failures are raised as TaskvecError."""
        with self._embedder.work:
            return await self._answer(request)

    async def _answer(self, request: Request) -> Response:
        headers = header_dict(request.scope)
        if headers.get("content-type") != WIRE_TYPE:
            raise UnsupportedMediaTypeError(f"Only {WIRE_TYPE} is taken here; see /v1/embeddings.")
        seconds = request_timeout(headers, self._limits.seconds)
        priority = request_priority(headers, context_of(request.scope).key)
        body = await read_bytes(request.receive, headers, self._limits)
        try:
            ids, adapters = unpack_texts(headers.get(ADAPTERS_HEADER, ""), body)
        except ValueError as error:
            raise InvalidRequestError(
                f"The body is not in taskvec's engine format: {error}.", code="invalid_body"
            ) from None
        self._check(ids)
        record = context_of(request.scope)
        record.texts = len(ids)
        vectors = await cancel_on_disconnect(
            request.receive,
            self._embed(ids, adapters, time.monotonic() + seconds, priority, record),
        )
        record.tokens = sum(map(len, ids))
        return Response(vectors, media_type=WIRE_TYPE)

    async def _embed(
        self,
        ids: list[TokenIds],
        adapters: list[str | None],
        deadline: float,
        priority: Priority,
        record: RequestContext,
    ) -> bytes:
        places: dict[str | None, list[int]] = {}
        for place, adapter in enumerate(adapters):
            places.setdefault(adapter, []).append(place)
        jobs = [
            EmbedJob(
                inputs=[ids[place] for place in chosen],
                task=self._task(adapter),
                normalized=False,
                deadline=deadline,
                priority=priority,
                owner=record.key.name if record.key is not None else None,
            )
            for adapter, chosen in places.items()
        ]
        answers = await self._embedder.embed_together(jobs, record.stages, record.charge)
        if len(jobs) == 1:
            return answers[0].vectors.astype("<f4", copy=False).tobytes()
        vectors = np.empty((len(ids), self._embedder.model.dimension), dtype="<f4")
        for chosen, answer in zip(places.values(), answers, strict=True):
            vectors[chosen] = answer.vectors
        return vectors.tobytes()

    def _task(self, adapter: str | None) -> Task:
        if adapter not in self._tasks:
            raise InvalidRequestError(
                f"There is no adapter {(adapter or '')[:80]!r} here.", code="unknown_adapter"
            )
        return self._tasks[adapter]

    def _check(self, ids: list[TokenIds]) -> None:
        if len(ids) > self._limits.texts:
            raise InvalidRequestError(
                f"{len(ids)} texts: at most {self._limits.texts} fit in one call.",
                code="too_many_inputs",
            )
        longest = max(map(len, ids))
        if longest > self._embedder.max_tokens:
            raise InvalidRequestError(
                f"A text has {longest} tokens: at most {self._embedder.max_tokens} fit.",
                code="input_too_long",
            )
        vocabulary = self._embedder.model.vocabulary
        if any(text.min() < 0 or text.max() >= vocabulary for text in ids):
            raise InvalidRequestError(
                f"A text has ids that this model lacks: they go from 0 to {vocabulary - 1}.",
                code="invalid_token_id",
            )
