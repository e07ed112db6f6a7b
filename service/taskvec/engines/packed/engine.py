"""The packed engine: loads a checkpoint, and lets workers compute the requests of its queue."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import structlog
import torch

from taskvec.cgroups import has_quota
from taskvec.checkpoint.backbone import ModelCard
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.concurrency import lower_priority
from taskvec.engines.base import (
    EngineHealth,
    EngineObserver,
    EngineResult,
    EngineState,
    TokenBatch,
)
from taskvec.engines.packed.adapter_check import check_adapters
from taskvec.engines.packed.device import available_bytes, choose_device, choose_dtype
from taskvec.engines.packed.gpu import GpuTransformer
from taskvec.engines.packed.lanes import Lanes
from taskvec.engines.packed.scheduler import TokenBudget
from taskvec.engines.packed.weights import AnyTransformer, load_transformer
from taskvec.engines.packed.worker import Request, WaitingRequests, Worker
from taskvec.errors import CheckpointError, StartError, UnavailableError
from taskvec.priority import Priority

MAX_MERGED_SHARE = 0.5
"""Adapters are merged if the merged weights take at most this share of the free memory."""

CUDA_BATCH_TOKENS = 32_768
"""Default tokens of one forward pass on CUDA."""

REQUESTS_PER_BATCH = 4
"""Number of large requests that share one full batch: determines the quantum of the queue."""

CPU_LANES = [(Priority.INTERACTIVE,), (Priority.BULK,)]
"""Classes of each lane on a CPU, where a forward pass can be paused."""

BULK_NICENESS = 19
"""What the threads of the bulk lane add to their nice value, so that an interactive forward pass
gets the cores at once, before the bulk one reaches its next step."""

log = structlog.get_logger(__name__)


POLL_INTERVAL = 0.01
"""Seconds between two checks of whether the threads have ended."""


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
        self._waiting = WaitingRequests(observer)
        self._workers: list[Worker] = []
        self._threads: list[threading.Thread] = []
        self._ends_with_program = False

    @property
    def model(self) -> ModelCard:
        """See ``Engine.model``."""
        return self._checkpoint.card

    @property
    def finished(self) -> int:
        """See ``Engine.finished``: the number of embedded texts."""
        return self._waiting.finished

    @property
    def batch_tokens(self) -> int:
        """See ``Engine.batch_tokens``: the current budget; 0 until the weights are loaded."""
        return self._waiting.budget.tokens

    def health(self) -> EngineHealth:
        """See ``Engine.health``."""
        return self._health

    async def start(self) -> None:
        """See ``Engine.start``."""
        loop = asyncio.get_running_loop()
        started: asyncio.Future[None] = loop.create_future()
        try:
            self._start_thread("packed-engine", self._load_and_work, loop, started)
        except StartError as error:
            self._health = EngineHealth(EngineState.DEAD, str(error))
            raise
        await started

    async def embed(self, batch: TokenBatch) -> EngineResult:
        """See ``Engine.embed``."""
        loop = asyncio.get_running_loop()
        # Longest first: texts of similar length end up in the same batch.
        order = sorted(range(len(batch.ids)), key=lambda i: -len(batch.ids[i]))
        request = Request(
            batch=batch,
            order=order,
            vectors=np.empty((len(order), self.model.dimension), dtype=np.float32),
            loop=loop,
            future=loop.create_future(),
            queued_at=time.monotonic(),
            missing=len(order),
        )
        try:
            with self._waiting.lock:
                self._health.require_ready()
                self._waiting.push(request)
                self._notify(batch.priority)
            return await request.future
        except BaseException:  # also if memory ran out after it was pushed
            request.withdrawn = True
            raise

    async def stop(self) -> None:
        """See ``Engine.stop``."""
        with self._waiting.lock:
            self._waiting.stopping = True
            if self._health.ready:
                self._health = EngineHealth(
                    EngineState.STOPPING, "it finishes the admitted requests"
                )
            self._notify()
        # Not joined in a thread: there may be none left. The first one appends the others before
        # it ends.
        while any(thread.is_alive() for thread in self._threads):  # noqa: ASYNC110 - no event
            await asyncio.sleep(POLL_INTERVAL)
        if self._health.state is not EngineState.DEAD:
            self._health = EngineHealth(EngineState.DEAD, "stopped")

    def stop_at_exit(self, seconds: float) -> None:
        """Drop what waits, let the threads end after their batches, and wait for a while.

        Unlike ``stop``, it needs no event loop and no thread pool: they end before the interpreter.
        """
        limit = time.monotonic() + seconds
        with self._waiting.lock:
            self._ends_with_program = True
            self._health = EngineHealth(EngineState.STOPPING, "the program ends")
            self._waiting.stopping = True
            # The interpreter aborts the process if a thread still computes when it ends.
            for request in self._waiting.queue.clear(Priority):
                request.withdrawn = True
            self._notify()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, limit - time.monotonic()))

    def _notify(self, priority: Priority | None = None) -> None:
        """Wake the worker of a class, or all workers; the caller holds the lock."""
        for worker in self._workers:
            if priority is None or priority in worker.lane.classes:
                worker.lane.wake.notify()

    def _start_thread(self, name: str, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, name=name, daemon=True)
        with self._waiting.lock:  # stop_at_exit waits for each thread that was started
            if self._ends_with_program:
                raise StartError("The engine was not started: the program ends.")
            try:
                thread.start()
            except (RuntimeError, MemoryError) as error:
                raise StartError(
                    f"A thread of the engine could not be started ({error}): raise the limits of "
                    "processes and memory."
                ) from None
            self._threads.append(thread)

    # The methods below run on the threads of the engine.

    def _load_and_work(
        self, loop: asyncio.AbstractEventLoop, started: asyncio.Future[None]
    ) -> None:
        """Load the weights, start the other workers, and be the first one."""
        try:
            transformer = self._load()
            self._make_workers(transformer)
            first, *others = self._workers
            for worker in others:
                self._start_thread("packed-bulk", self._work, worker, BULK_NICENESS)
        except BaseException as error:  # noqa: BLE001 - start() raises it
            with self._waiting.lock:
                self._health = EngineHealth(EngineState.DEAD, str(error))
                self._waiting.stopping = True
                self._notify()
            loop.call_soon_threadsafe(started.set_exception, error)
            return
        with self._waiting.lock:
            if not self._waiting.stopping:
                self._health = EngineHealth(EngineState.READY)
        loop.call_soon_threadsafe(started.set_result, None)
        self._work(first, niceness=0)

    def _make_workers(self, transformer: AnyTransformer) -> None:
        """Make one worker for each class on a CPU, and one for both on a GPU."""
        on_gpu = isinstance(transformer, GpuTransformer)
        classes = [tuple(Priority)] if on_gpu else CPU_LANES
        lanes = Lanes(classes, self._waiting.queue, self._waiting.lock)
        counts_processor = not on_gpu and not has_quota()
        for lane in lanes:
            forward = transformer
            if self._workers and not isinstance(transformer, GpuTransformer):
                forward = transformer.in_lane(partial(lanes.step, lane), BULK_NICENESS)
            self._workers.append(Worker(lane, lanes, self._waiting, forward, counts_processor))

    def _work(self, worker: Worker, niceness: int) -> None:
        if niceness:
            lower_priority(niceness)
        try:
            worker.run()
        except BaseException as error:  # callers must not wait for a thread that has ended
            log.exception("engine_died")
            self._die(f"its thread ended ({type(error).__name__}: {error})", worker)

    def _die(self, reason: str, ended: Worker) -> None:
        """Fail every request; the other workers end after the batch that they compute."""
        with self._waiting.lock:
            self._health = EngineHealth(EngineState.DEAD, reason)
            self._waiting.stopping = True
            requests = self._waiting.queue.clear(Priority)
            self._waiting.report()
            ended.lanes.abandon(ended.lane)
            requests.update(*(worker.computing for worker in self._workers))
        for request in requests:
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
        self._waiting.budget = TokenBudget(options.max_batch_tokens or default_tokens)
        self._waiting.queue.quantum = max(1, self._waiting.budget.tokens // REQUESTS_PER_BATCH)
        log.info(
            "engine_ready",
            model=checkpoint.card.name,
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            adapters=list(checkpoint.card.adapters),
            adapter_mode="merged" if merge else "low-rank",
            max_batch_tokens=self._waiting.budget.tokens,
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
