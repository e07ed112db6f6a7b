"""POST /v1/engine/embed: token ids from taskvec gateways, several adapters in one call."""

from __future__ import annotations

import time

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from taskvec.api.context import RequestContext, context_of
from taskvec.api.endpoint import Route
from taskvec.api.request import (
    RequestLimits,
    cancel_on_disconnect,
    header_dict,
    joined,
    read_chunks,
    request_priority,
    request_timeout,
)
from taskvec.api.response import VectorsByType, answer_bytes, respond
from taskvec.concurrency import LargeWork
from taskvec.core.embedder import AsyncEmbedder
from taskvec.core.job import Embeddings, EmbedJob
from taskvec.core.output_format import Encoding, OutputFormat
from taskvec.core.tasks import Task
from taskvec.engines.base import TokenIds
from taskvec.engines.wire import ADAPTERS_HEADER, WIRE_PATH, WIRE_TYPE, count_texts, unpack_texts
from taskvec.errors import InvalidRequestError, UnsupportedMediaTypeError
from taskvec.priority import Priority
from taskvec.service import Service

UNPACK_INLINE_TEXTS = 256
UNPACK_INLINE_BYTES = 1 << 18
"""Largest call that is unpacked in the event loop: a fraction of a millisecond."""


def routes(service: Service, limits: RequestLimits) -> list[Route]:
    """Return the route; none if the service refuses token ids."""
    if not limits.token_ids:
        return []
    handler = EngineEmbed(service.embedder, limits, service.large_work).handle
    return [Route(method="POST", path=WIRE_PATH, handler=handler, embeds=True, documented=False)]


class EngineEmbed:
    """Unpacks texts, embeds those of one adapter as one job, packs the vectors."""

    def __init__(
        self, embedder: AsyncEmbedder, limits: RequestLimits, large_work: LargeWork
    ) -> None:
        """Embed with one embedder, within the limits of a request."""
        self._embedder = embedder
        self._limits = limits
        self._large_work = large_work
        # Vectors as the engine returns them: full width, not normalised.
        self._output = OutputFormat(
            embedder.model.dimension, normalized=False, encoding=Encoding.RAW
        )
        self._tasks: dict[str | None, Task] = {task.adapter: task for task in embedder.tasks}

    async def handle(self, request: Request) -> Response:
        """Answer one call.

        Raises:
            TaskvecError: the call is invalid, or cannot be embedded.
        """
        context = context_of(request.scope)
        headers = header_dict(request.scope)
        if headers.get("content-type") != WIRE_TYPE:
            raise UnsupportedMediaTypeError(
                f"Content-Type must be {WIRE_TYPE}; JSON goes to /v1/embeddings."
            )
        seconds = request_timeout(headers, self._limits.seconds)
        priority = request_priority(headers, context.key)
        chunks, size = await read_chunks(request.receive, headers, self._limits, context.memory)
        names = headers.get(ADAPTERS_HEADER, "")
        if size <= UNPACK_INLINE_BYTES and self._count(joined(chunks)) <= UNPACK_INLINE_TEXTS:
            ids, adapters = self._unpack(names, chunks)
        else:
            ids, adapters = await self._large_work.run(size, lambda: self._unpack(names, chunks))
        context.texts = len(ids)
        if context.memory is not None:  # the ids are views of the body
            vectors = answer_bytes(len(ids), self._embedder.model.dimension, self._output)
            context.memory.resize(size + vectors)
        result = await cancel_on_disconnect(
            request.receive,
            self._embed(ids, adapters, time.monotonic() + seconds, priority, context),
        )
        context.tokens = result.tokens
        return await respond(result, self._output, _render, context, self._large_work)

    async def _embed(
        self,
        ids: list[TokenIds],
        adapters: list[str | None],
        deadline: float,
        priority: Priority,
        context: RequestContext,
    ) -> Embeddings:
        indices: dict[str | None, list[int]] = {}
        for i, adapter in enumerate(adapters):
            indices.setdefault(adapter, []).append(i)
        jobs = [
            EmbedJob(
                inputs=[ids[i] for i in chosen],
                task=self._task(adapter),
                deadline=deadline,
                priority=priority,
                tenant=context.key.name if context.key is not None else None,
                indices=chosen,
            )
            for adapter, chosen in indices.items()
        ]
        results = await self._embedder.embed_all(jobs, context)
        if len(results) == 1:
            return results[0]
        vectors = np.empty((len(ids), self._embedder.model.dimension), dtype=np.float32)
        for chosen, result in zip(indices.values(), results, strict=True):
            vectors[chosen] = result.vectors
        return Embeddings(vectors, sum(result.tokens for result in results))

    def _task(self, adapter: str | None) -> Task:
        if adapter not in self._tasks:
            raise InvalidRequestError(
                f"There is no adapter {(adapter or '')[:80]!r} here.", code="unknown_adapter"
            )
        return self._tasks[adapter]

    def _count(self, body: bytes) -> int:
        """Return the number of texts; refuse too many before they are unpacked."""
        try:
            texts = count_texts(body)
        except ValueError as error:
            raise _invalid(error) from None
        if texts > self._limits.texts:
            raise InvalidRequestError(
                f"{texts} texts: at most {self._limits.texts} fit in one call.",
                code="too_many_inputs",
            )
        return texts

    def _unpack(self, names: str, chunks: list[bytes]) -> tuple[list[TokenIds], list[str | None]]:
        """Return the texts and the adapter of each; may run in a thread."""
        body = joined(chunks)
        self._count(body)
        try:
            ids, adapters = unpack_texts(names, body)
        except ValueError as error:
            raise _invalid(error) from None
        longest = max(map(len, ids))
        if longest > self._embedder.max_tokens:
            raise InvalidRequestError(
                f"A text has {longest} tokens: at most {self._embedder.max_tokens} fit.",
                code="input_too_long",
            )
        vocabulary = self._embedder.model.vocabulary
        every = np.concatenate(ids)
        if every.min() < 0 or every.max() >= vocabulary:
            raise InvalidRequestError(
                f"A text has ids that this model lacks: they go from 0 to {vocabulary - 1}.",
                code="invalid_token_id",
            )
        return ids, adapters


def _invalid(error: ValueError) -> InvalidRequestError:
    return InvalidRequestError(
        f"The body is not in taskvec's engine format: {error}.", code="invalid_body"
    )


def _render(vectors: VectorsByType, _: int) -> Response:
    (matrix,) = vectors.values()
    return Response(matrix.astype("<f4", copy=False).tobytes(), media_type=WIRE_TYPE)
