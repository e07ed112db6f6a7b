"""The packed engine: one worker thread takes batches from a fair queue and runs forward passes."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from taskvec.checkpoint.backbone import ModelCard
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.engines.base import (
    DropReason,
    EngineHealth,
    EngineObserver,
    EngineResult,
    EngineState,
    TokenBatch,
)
from taskvec.engines.packed.adapter_check import check_adapters
from taskvec.engines.packed.device import (
    available_bytes,
    choose_device,
    choose_dtype,
    is_out_of_memory,
    release_memory,
)
from taskvec.engines.packed.scheduler import FairQueue, TokenBudget
from taskvec.engines.packed.weights import AnyTransformer, load_transformer
from taskvec.errors import (
    CheckpointError,
    DeadlineExceededError,
    TaskvecError,
    UnavailableError,
)
from taskvec.malloc import trim_malloc

MAX_MERGED_SHARE = 0.5
"""Adapters are merged if the merged weights take at most this share of the free memory."""

CUDA_BATCH_TOKENS = 32_768
"""Default tokens of one forward pass on CUDA."""

REQUESTS_PER_BATCH = 4
"""Number of large requests that share one full batch: determines the quantum of the queue."""

TRIM_INTERVAL_SECONDS = 10.0
"""Interval at which free memory pages are returned to the system, after the texts of a forward pass
are answered, so that only waiting texts are delayed."""

log = structlog.get_logger(__name__)


@dataclass(eq=False, slots=True)
class _Request:
    """One ``embed`` call; the worker thread fills ``vectors`` and resolves ``future``.

    Attributes:
        batch: the texts.
        order: indices of the texts in the batch, longest first.
        vectors: float32 [texts, dimension], the result.
        loop: event loop of the caller.
        future: resolved with the result.
        queued_at: ``time.monotonic()`` of the call.
        missing: texts without a vector.
        started_at: ``time.monotonic()`` when the first text entered a forward pass.
        withdrawn: True if the caller was cancelled or the request has failed.
    """

    batch: TokenBatch
    order: list[int]
    vectors: NDArray[np.float32]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[EngineResult]
    queued_at: float
    missing: int
    started_at: float | None = None
    withdrawn: bool = False

    def answer(self, result: EngineResult | BaseException) -> None:
        """Resolve the future of the caller, from any thread; does nothing if it is resolved."""
        try:
            self.loop.call_soon_threadsafe(self._resolve, result)
        except RuntimeError:
            log.warning("caller_loop_closed")  # the event loop of the caller has ended

    def _resolve(self, result: EngineResult | BaseException) -> None:
        if self.future.done():
            return
        if isinstance(result, BaseException):
            self.future.set_exception(result)
        else:
            self.future.set_result(result)


_Row = tuple[_Request, int]
"""One text: its request and its index in the batch of the request."""


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """A started forward pass.

    Attributes:
        rows: its texts.
        started: ``time.monotonic()`` of the start.
        wait: waits for the vectors, float32 [texts, hidden], and returns them.
    """

    rows: Sequence[_Row]
    started: float
    wait: Callable[[], NDArray[np.float32]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedOptions:
    """Options of the packed engine; the defaults suit most machines.

    Attributes:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``auto``, ``bfloat16``, ``float16`` or ``float32``.
        adapter_mode: ``merged``, ``low-rank``, or ``auto`` to choose by free memory.
        max_batch_tokens: maximum tokens of one forward pass; 0 for the default of the device.
        threads: processor threads of a forward pass; 0 for one per available core.
    """

    device: str = "auto"
    dtype: str = "auto"
    adapter_mode: str = "auto"
    max_batch_tokens: int = 0
    threads: int = 0


class PackedEngine:
    """Engine that computes in this process with torch, on a CPU or a CUDA device."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: PackedOptions | None = None,
        observer: EngineObserver | None = None,
    ) -> None:
        """Create the engine; ``start`` loads the weights.

        Args:
            checkpoint: the checkpoint to serve.
            options: how the engine runs.
            observer: notified of the queue and of every forward pass.
        """
        self._checkpoint = checkpoint
        self._options = options or PackedOptions()
        self._observer = observer
        self._health = EngineHealth(EngineState.STARTING, "it is loading the model")
        self._wake = threading.Condition()
        self._queue: FairQueue[_Request] = FairQueue(quantum=1)
        self._budget = TokenBudget(0)
        self._stopping = False
        self._finished = 0
        self._trimmed_at = 0.0
        self._computed_until = 0.0
        self._started: deque[_Batch] = deque()
        self._running: set[_Request] = set()
        self._worker: threading.Thread | None = None

    @property
    def model(self) -> ModelCard:
        """See ``Engine.model``."""
        return self._checkpoint.card

    @property
    def finished(self) -> int:
        """See ``Engine.finished``: the number of embedded texts."""
        return self._finished

    @property
    def batch_tokens(self) -> int:
        """See ``Engine.batch_tokens``: the current budget; 0 until the weights are loaded."""
        return self._budget.tokens

    def health(self) -> EngineHealth:
        """See ``Engine.health``."""
        return self._health

    async def start(self) -> None:
        """See ``Engine.start``."""
        loop = asyncio.get_running_loop()
        started: asyncio.Future[None] = loop.create_future()
        self._worker = threading.Thread(
            target=self._work, args=(loop, started), name="packed-engine", daemon=True
        )
        self._worker.start()
        await started

    async def embed(self, batch: TokenBatch) -> EngineResult:
        """See ``Engine.embed``."""
        loop = asyncio.get_running_loop()
        # Longest first: texts of similar length end up in the same batch.
        order = sorted(range(len(batch.ids)), key=lambda i: -len(batch.ids[i]))
        request = _Request(
            batch=batch,
            order=order,
            vectors=np.empty((len(order), self.model.dimension), dtype=np.float32),
            loop=loop,
            future=loop.create_future(),
            queued_at=time.monotonic(),
            missing=len(order),
        )
        with self._wake:
            self._health.require_ready()
            self._queue.push(request, [len(batch.ids[i]) for i in order], batch.priority)
            self._report_queue()
            self._wake.notify()
        try:
            return await request.future
        except asyncio.CancelledError:
            request.withdrawn = True
            raise

    async def stop(self) -> None:
        """See ``Engine.stop``."""
        with self._wake:
            self._stopping = True
            if self._health.ready:
                self._health = EngineHealth(
                    EngineState.STOPPING, "it finishes the admitted requests"
                )
            self._wake.notify()
        if self._worker is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._worker.join)

    # The methods below run on the worker thread.

    def _work(self, loop: asyncio.AbstractEventLoop, started: asyncio.Future[None]) -> None:
        try:
            transformer = self._load()
        except BaseException as error:  # noqa: BLE001 - start() raises it
            self._health = EngineHealth(EngineState.DEAD, str(error))
            loop.call_soon_threadsafe(started.set_exception, error)
            return
        with self._wake:
            if not self._stopping:
                self._health = EngineHealth(EngineState.READY)
        loop.call_soon_threadsafe(started.set_result, None)
        try:
            self._run_batches(transformer)
        except BaseException as error:  # callers must not wait for a thread that has ended
            log.exception("engine_died")
            self._die(f"its thread ended ({type(error).__name__}: {error})")
        else:
            self._health = EngineHealth(EngineState.DEAD, "stopped")

    def _die(self, reason: str) -> None:
        with self._wake:
            self._health = EngineHealth(EngineState.DEAD, reason)
            waiting = [request for request, _ in self._queue.drop(lambda _: True)]
            self._report_queue()
        for request in {*waiting, *self._running}:
            request.answer(UnavailableError(f"The engine is dead: {reason}.", retry_after=1))

    def _load(self) -> AnyTransformer:
        options, checkpoint = self._options, self._checkpoint
        started = time.monotonic()
        try:
            device = choose_device(options.device)
            dtype = choose_dtype(options.dtype, device)
            merge = self._should_merge(device, dtype)
            transformer = load_transformer(
                checkpoint, device=device, dtype=dtype, merge=merge, threads=options.threads
            )
        except (RuntimeError, MemoryError) as error:
            raise CheckpointError(
                f"{checkpoint.folder} could not be loaded ({error}): check --device, --dtype, and "
                "the free memory."
            ) from error
        check_adapters(transformer, checkpoint.card.adapters)
        default_tokens = 2 * transformer.block_rows if device.type == "cpu" else CUDA_BATCH_TOKENS
        self._budget = TokenBudget(options.max_batch_tokens or default_tokens)
        self._queue.quantum = max(1, self._budget.tokens // REQUESTS_PER_BATCH)
        log.info(
            "engine_ready",
            model=checkpoint.card.name,
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            adapters=list(checkpoint.card.adapters),
            adapter_mode="merged" if merge else "low-rank",
            max_batch_tokens=self._budget.tokens,
            threads=transformer.threads,
            seconds=round(time.monotonic() - started, 2),
        )
        return transformer

    def _should_merge(self, device: torch.device, dtype: torch.dtype) -> bool:
        if self._options.adapter_mode != "auto":
            return self._options.adapter_mode == "merged"
        backbone, adapters = self._checkpoint.backbone, len(self._checkpoint.adapters)
        adapter_bytes = adapters * backbone.linear_parameters * dtype.itemsize
        backbone_bytes = backbone.parameters * dtype.itemsize
        return adapter_bytes <= MAX_MERGED_SHARE * (available_bytes(device) - backbone_bytes)

    def _next_batch(self, *, wait: bool) -> list[_Row]:
        """Return the next batch, or an empty list if there is none.

        Args:
            wait: True to wait for a batch; the list is then empty only if the engine has stopped.
        """
        with self._wake:
            while True:
                self._drop_abandoned()
                self._budget.grow()
                taken = self._queue.take(self._budget.tokens)
                if taken or self._stopping or not wait:
                    break
                self._wake.wait()
            self._report_queue()
        return [(request, request.order[index]) for request, index in taken]

    def _drop_abandoned(self) -> None:
        now = time.monotonic()
        for request, texts in self._queue.drop(lambda request: request.withdrawn):
            self._report_dropped(DropReason.CANCELLED, texts, request)
        for request, texts in self._queue.drop(lambda request: _expired(request.batch, now)):
            self._report_dropped(DropReason.EXPIRED, texts, request)
            request.answer(DeadlineExceededError("The request's deadline passed in the queue."))

    def _run_batches(self, transformer: AnyTransformer) -> None:
        """Run batches until the engine stops; on a GPU, start one while another is computed."""
        running = self._started
        while True:
            rows = self._next_batch(wait=not running)
            if rows:
                self._report_started(rows)
                batch = self._start(transformer, rows)
                if batch is not None:
                    running.append(batch)
            elif not running:
                return
            if running and (len(running) >= transformer.max_started or not rows):
                self._finish(transformer, running.popleft())
            self._running = {request for batch in running for request, _ in batch.rows}
            if time.monotonic() - self._trimmed_at >= TRIM_INTERVAL_SECONDS:
                trim_malloc()
                self._trimmed_at = time.monotonic()

    def _report_started(self, rows: Sequence[_Row]) -> None:
        started = time.monotonic()
        waited = []
        self._running |= {request for request, _ in rows}
        for request, _ in rows:
            if request.started_at is None:
                request.started_at = started
                request.batch.entered()
                waited.append(started - request.queued_at)
        if self._observer is not None:
            self._observer.batch_started(waited)

    def _forward(self, transformer: AnyTransformer, rows: Sequence[_Row]) -> None:
        """Embed texts in one forward pass, or in several smaller ones if memory runs out."""
        batch = self._start(transformer, rows)
        if batch is not None:
            self._finish(transformer, batch)

    def _start(self, transformer: AnyTransformer, rows: Sequence[_Row]) -> _Batch | None:
        """Start a forward pass; returns None if nothing is left to finish."""
        rows = [row for row in rows if not row[0].withdrawn]
        if not rows:
            return None
        ids = [request.batch.ids[i] for request, i in rows]
        started = time.monotonic()
        try:
            wait = transformer.start(ids, [request.batch.adapter for request, _ in rows])
        except Exception as error:  # noqa: BLE001 - reported to the callers
            self._charge(rows, started)
            self._handle_failure(transformer, rows, error)
            return None
        return _Batch(rows, started, wait)

    def _finish(self, transformer: AnyTransformer, batch: _Batch) -> None:
        """Wait for a forward pass and answer the requests whose last text it contained."""
        rows = batch.rows
        try:
            vectors = batch.wait()
        except Exception as error:  # noqa: BLE001 - reported to the callers
            self._charge(rows, batch.started)
            self._handle_failure(transformer, rows, error)
            return
        seconds = self._charge(rows, batch.started)
        self._finished += len(rows)
        if self._observer is not None:
            tokens = sum(len(request.batch.ids[i]) for request, i in rows)
            self._observer.batch_finished(len(rows), tokens, seconds, self._budget.tokens)
        done = time.monotonic()
        first = 0
        for request, own in groupby(rows, key=itemgetter(0)):
            texts = [i for _, i in own]
            request.vectors[texts] = vectors[first : first + len(texts)]
            first += len(texts)
            request.missing -= len(texts)
            if request.missing == 0 and request.started_at is not None:
                request.answer(
                    EngineResult(
                        vectors=request.vectors,
                        queued=request.started_at - request.queued_at,
                        computed=done - request.started_at,
                    )
                )

    def _charge(self, rows: Sequence[_Row], started: float) -> float:
        """Charge a forward pass to its class; return its seconds, without those of the previous."""
        done = time.monotonic()
        seconds = done - max(started, self._computed_until)
        self._computed_until = done
        with self._wake:
            self._queue.charge(rows[0][0].batch.priority, seconds)
        return seconds

    def _handle_failure(
        self, transformer: AnyTransformer, rows: Sequence[_Row], failure: Exception
    ) -> None:
        if is_out_of_memory(failure):
            failure.__traceback__ = None  # its frames reference tensors of the forward pass
            self._split(transformer, rows, failure)
        else:
            log.error("forward_failed", texts=len(rows), exc_info=failure)
            self._fail([request for request, _ in rows], failure)

    def _split(self, transformer: AnyTransformer, rows: Sequence[_Row], failure: Exception) -> None:
        while self._started:  # they are being computed, and must not wait for this batch
            self._finish(transformer, self._started.popleft())
        release_memory(transformer.device)
        tokens = sum(len(request.batch.ids[i]) for request, i in rows)
        with self._wake:
            self._budget.shrink(tokens)
        log.warning(
            "memory_ran_out",
            texts=len(rows),
            tokens=tokens,
            max_batch_tokens=self._budget.tokens,
            reason=str(failure).partition("\n")[0],
        )
        if self._observer is not None:
            self._observer.memory_ran_out(self._budget.tokens)
        if len(rows) == 1:
            request, i = rows[0]
            self._fail(
                [request],
                TaskvecError(
                    f"input[{i}] has {tokens} tokens, which do not fit into the engine's memory "
                    "even alone: send a shorter text, or ask the operator for more memory.",
                    code="out_of_memory",
                    param=f"input[{i}]",
                ),
            )
            return
        middle = len(rows) // 2
        self._forward(transformer, rows[:middle])
        self._forward(transformer, rows[middle:])

    def _fail(self, failed: Iterable[_Request], error: Exception) -> None:
        requests = set(failed)
        with self._wake:
            waiting = dict(self._queue.drop(lambda request: request in requests))
            self._report_queue()
        for request in requests:
            request.withdrawn = True
            self._report_dropped(DropReason.FAILED, 1 + waiting.get(request, 0), request)
            request.answer(
                error
                if isinstance(error, TaskvecError)
                else TaskvecError("The engine failed on this batch; see the log for the reason.")
            )

    def _report_queue(self) -> None:
        if self._observer is not None:
            oldest = self._queue.oldest
            since = None if oldest is None else oldest.queued_at
            self._observer.queue_changed(self._queue.texts, self._queue.tokens, since)

    def _report_dropped(self, reason: DropReason, texts: int, request: _Request) -> None:
        log.info("texts_dropped", reason=reason, texts=texts, of=len(request.order))
        if self._observer is not None:
            self._observer.texts_dropped(reason, texts)


def _expired(batch: TokenBatch, now: float) -> bool:
    return batch.deadline is not None and now > batch.deadline
