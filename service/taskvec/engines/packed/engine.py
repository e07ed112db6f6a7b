"""The packed engine: one worker thread that runs forwards while callers queue."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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
from taskvec.engines.packed.device import (
    available_bytes,
    choose_device,
    choose_dtype,
    is_out_of_memory,
    release_memory,
)
from taskvec.engines.packed.scheduler import FairQueue, TokenBudget
from taskvec.engines.packed.selftest import prove_adapters
from taskvec.engines.packed.transformer import Transformer
from taskvec.engines.packed.weights import load_transformer
from taskvec.errors import (
    CheckpointError,
    DeadlineExceededError,
    TaskvecError,
    UnavailableError,
)
from taskvec.malloc import trim_malloc
from taskvec.priority import Priority

MERGE_SHARE = 0.5
"""Adapters are merged if their full weights take at most this share of the free memory."""

CUDA_BATCH_TOKENS = 32_768
TURNS_A_BATCH = 4
"""Requests that get a turn in one full batch."""

RETURN_MEMORY_EVERY = 10.0
"""Seconds between two times that free pages are given back: after a forward, when its texts are
answered, so that only what waits behind it is delayed."""

log = structlog.get_logger(__name__)


@dataclass(eq=False, slots=True)
class _Request:
    """One ``embed`` call; the worker thread fills ``vectors`` and answers ``future``."""

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
        """Give the caller its result, from any thread; too late is no error."""
        try:
            self.loop.call_soon_threadsafe(self._settle, result)
        except RuntimeError:
            log.warning("caller_loop_closed")  # the caller's loop ended: nobody waits any more

    def _settle(self, result: EngineResult | BaseException) -> None:
        if self.future.done():
            return
        if isinstance(result, BaseException):
            self.future.set_exception(result)
        else:
            self.future.set_result(result)


_Row = tuple[_Request, int]
"""One text: its request, and its place there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedOptions:
    """How the packed engine runs; the defaults suit most machines.

    Attributes:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``auto``, ``bfloat16``, ``float16`` or ``float32``.
        adapter_mode: ``merged``, ``low-rank``, or ``auto`` by free memory.
        max_batch_tokens: most tokens in one forward; 0 for what suits the device.
        threads: processor threads of a forward; 0 for one per core that the process may use.
    """

    device: str = "auto"
    dtype: str = "auto"
    adapter_mode: str = "auto"
    max_batch_tokens: int = 0
    threads: int = 0


class PackedEngine:
    """Embeds in this process with torch, on a CPU or a CUDA device."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: PackedOptions | None = None,
        observer: EngineObserver | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._options = options or PackedOptions()
        self._observer = observer
        self._health = EngineHealth(EngineState.STARTING, "it is loading the model")
        self._wake = threading.Condition()
        self._queue: FairQueue[_Request] = FairQueue(quantum=1)
        self._budget = TokenBudget(0)
        self._stopping = False
        self._finished = 0
        self._returned_at = 0.0
        self._running: set[_Request] = set()
        self._worker: threading.Thread | None = None

    @property
    def model(self) -> ModelCard:
        """See ``Engine.model``."""
        return self._checkpoint.card

    @property
    def finished(self) -> int:
        """See ``Engine.finished``: texts."""
        return self._finished

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
        # Longest first: neighbours in the queue become neighbours in a batch, of like length.
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
            fits = batch.tokens <= self._budget.tokens
            self._queue.push(
                request,
                [len(batch.ids[i]) for i in order],
                batch.priority if fits else Priority.BULK,
            )
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
                self._health = EngineHealth(EngineState.STOPPING, "it finishes what was admitted")
            self._wake.notify()
        if self._worker is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._worker.join)

    # What follows runs on the worker thread.

    def _work(self, loop: asyncio.AbstractEventLoop, started: asyncio.Future[None]) -> None:
        try:
            transformer = self._load()
        except BaseException as error:  # noqa: BLE001 - whatever it was, start() must raise it
            self._health = EngineHealth(EngineState.DEAD, str(error))
            loop.call_soon_threadsafe(started.set_exception, error)
            return
        with self._wake:
            if not self._stopping:
                self._health = EngineHealth(EngineState.READY)
        loop.call_soon_threadsafe(started.set_result, None)
        try:
            while batch := self._next_batch():
                self._run(transformer, batch)
        except BaseException as error:  # a bug here must not leave callers waiting
            log.exception("engine_died")
            self._die(f"its thread ended ({type(error).__name__}: {error})")
        else:
            self._health = EngineHealth(EngineState.DEAD, "stopped")

    def _die(self, reason: str) -> None:
        with self._wake:
            self._health = EngineHealth(EngineState.DEAD, reason)
            left = [request for request, _ in self._queue.drop(lambda _: True)]
            self._report_queue()
        for request in {*left, *self._running}:
            request.answer(UnavailableError(f"The engine is dead: {reason}.", retry_after=1))

    def _load(self) -> Transformer:
        options, checkpoint = self._options, self._checkpoint
        begun = time.monotonic()
        try:
            device = choose_device(options.device)
            dtype = choose_dtype(options.dtype, device)
            merge = self._merge(device, dtype)
            transformer = load_transformer(
                checkpoint, device=device, dtype=dtype, merge=merge, threads=options.threads
            )
        except (RuntimeError, MemoryError) as error:
            raise CheckpointError(
                f"{checkpoint.folder} could not be loaded ({error}): check --device and --dtype, "
                "and that the machine has the memory."
            ) from error
        prove_adapters(transformer, checkpoint.card.adapters)
        automatic = 2 * transformer.block_rows if device.type == "cpu" else CUDA_BATCH_TOKENS
        self._budget = TokenBudget(options.max_batch_tokens or automatic)
        self._queue.quantum = max(1, self._budget.tokens // TURNS_A_BATCH)
        log.info(
            "engine_ready",
            model=checkpoint.card.name,
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            adapters=list(checkpoint.card.adapters),
            adapter_mode="merged" if merge else "low-rank",
            max_batch_tokens=self._budget.tokens,
            threads=transformer.threads,
            seconds=round(time.monotonic() - begun, 2),
        )
        return transformer

    def _merge(self, device: torch.device, dtype: torch.dtype) -> bool:
        if self._options.adapter_mode != "auto":
            return self._options.adapter_mode == "merged"
        backbone, adapters = self._checkpoint.backbone, len(self._checkpoint.adapters)
        extra = adapters * backbone.linear_parameters * dtype.itemsize
        base = backbone.parameters * dtype.itemsize
        return extra <= MERGE_SHARE * (available_bytes(device) - base)

    def _next_batch(self) -> list[_Row]:
        """Wait for work; an empty list when the engine stops and nothing is left."""
        with self._wake:
            while True:
                self._drop_abandoned()
                self._budget.grow()
                taken = self._queue.take(self._budget.tokens)
                if taken or self._stopping:
                    break
                self._wake.wait()
            self._report_queue()
        return [(request, request.order[place]) for request, place in taken]

    def _drop_abandoned(self) -> None:
        now = time.monotonic()
        for request, texts in self._queue.drop(lambda request: request.withdrawn):
            self._report_dropped(DropReason.CANCELLED, texts, request)
        for request, texts in self._queue.drop(lambda request: _expired(request.batch, now)):
            self._report_dropped(DropReason.EXPIRED, texts, request)
            request.answer(DeadlineExceededError("The request's deadline passed in the queue."))

    def _run(self, transformer: Transformer, rows: Sequence[_Row]) -> None:
        begun = time.monotonic()
        waited = []
        self._running = {request for request, _ in rows}
        for request, _ in rows:
            if request.started_at is None:
                request.started_at = begun
                request.batch.entered()
                waited.append(begun - request.queued_at)
        if self._observer is not None:
            self._observer.batch_started(waited)
        self._forward(transformer, rows)
        self._running = set()
        if time.monotonic() - self._returned_at >= RETURN_MEMORY_EVERY:
            trim_malloc()
            self._returned_at = time.monotonic()

    def _forward(self, transformer: Transformer, rows: Sequence[_Row]) -> None:
        """Embed texts in one forward, or in several smaller ones where memory runs out."""
        rows = [row for row in rows if not row[0].withdrawn]
        if not rows:
            return
        ids = [request.batch.ids[i] for request, i in rows]
        begun = time.monotonic()
        failure: Exception | None = None
        try:
            vectors = transformer.embed(ids, [request.batch.adapter for request, _ in rows])
        except Exception as error:  # noqa: BLE001 - whatever it was, the callers are told
            failure = error
        done = time.monotonic()
        with self._wake:
            self._queue.spend(done - begun)
        if failure is not None:
            if is_out_of_memory(failure):
                failure.__traceback__ = None  # its frames hold what the forward had in memory
                self._split(transformer, rows, failure)
            else:
                log.error("forward_failed", texts=len(ids), exc_info=failure)
                self._fail([request for request, _ in rows], failure)
            return
        self._finished += len(ids)
        if self._observer is not None:
            tokens = sum(map(len, ids))
            self._observer.batch_finished(len(ids), tokens, done - begun, self._budget.tokens)
        for (request, i), vector in zip(rows, vectors, strict=True):
            request.vectors[i] = vector
            request.missing -= 1
            if request.missing == 0 and request.started_at is not None:
                request.answer(
                    EngineResult(
                        vectors=request.vectors,
                        queued=request.started_at - request.queued_at,
                        computed=done - request.started_at,
                    )
                )

    def _split(self, transformer: Transformer, rows: Sequence[_Row], failure: Exception) -> None:
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
                    f"input[{i}] has {tokens} tokens, and the engine's memory does not suffice for "
                    "it, even alone: send a shorter text, or ask the operator for more memory.",
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
                else TaskvecError("The engine failed on this batch; the log has the reason.")
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
