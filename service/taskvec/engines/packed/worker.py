"""The workers of the packed engine: threads that take batches from the queue and compute them."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter

import numpy as np
import structlog
from numpy.typing import NDArray

from taskvec.engines.base import DropReason, EngineObserver, EngineResult, TokenBatch
from taskvec.engines.packed.device import is_out_of_memory, release_memory
from taskvec.engines.packed.lanes import Lane, Lanes
from taskvec.engines.packed.scheduler import FairQueue, TokenBudget
from taskvec.engines.packed.weights import AnyTransformer
from taskvec.errors import DeadlineExceededError, OverloadedError, TaskvecError
from taskvec.malloc import trim_malloc

TRIM_INTERVAL_SECONDS = 10.0
"""Interval at which free memory pages are returned to the system, after the texts of a forward pass
are answered, so that only waiting texts are delayed."""

log = structlog.get_logger(__name__)


@dataclass(eq=False, slots=True)
class Request:
    """One ``embed`` call; the workers fill ``vectors`` and resolve ``future``.

    Attributes:
        batch: the texts.
        order: indices of the texts in the batch, longest first.
        vectors: float32 [texts, dimension], the result.
        loop: event loop of the caller.
        future: resolved with the result.
        queued_at: ``time.monotonic()`` of the call.
        missing: texts without a vector.
        started_at: ``time.monotonic()`` when the first text entered a forward pass.
        forward: seconds of its forward passes, without pauses.
        processor: seconds of processor time of the lane's thread in them; see ``Worker``.
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
    forward: float = 0.0
    processor: float = 0.0
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


Row = tuple[Request, int]
"""One text: its request and its index in the batch of the request."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """A started forward pass.

    Attributes:
        rows: its texts.
        budget: maximum tokens that it could have.
        lane_seconds: seconds for which its lane had computed at the start.
        processor: see ``Request``.
        wait: waits for the vectors, float32 [texts, hidden], and returns them.
    """

    rows: Sequence[Row]
    budget: int
    lane_seconds: float
    processor: float
    wait: Callable[[], NDArray[np.float32]]


class WaitingRequests:
    """The requests that wait for a forward pass, which the caller and the workers share.

    Attributes:
        lock: guards everything that callers and workers share.
        queue: the waiting requests.
        budget: maximum tokens of a forward pass.
        stopping: True if no more requests come.
        finished: number of embedded texts.
        proven_tokens: tokens of the largest forward pass that had enough memory.
    """

    def __init__(self, observer: EngineObserver | None) -> None:
        """Start with no request.

        Args:
            observer: notified of the queue and of every forward pass.
        """
        self.lock = threading.Lock()
        self.queue: FairQueue[Request] = FairQueue(quantum=1)
        self.budget = TokenBudget(0)
        self.observer = observer
        self.stopping = False
        self.finished = 0
        self.proven_tokens = 0

    def push(self, request: Request) -> None:
        """Add a request; the caller holds the lock."""
        batch = request.batch
        self.queue.push(request, [len(batch.ids[i]) for i in request.order], batch.priority)
        self.report()

    def drop_abandoned(self) -> bool:
        """Drop cancelled and expired requests; return whether there were any; the caller locks."""
        now = time.monotonic()
        cancelled = self.queue.drop(lambda request: request.withdrawn)
        for request, texts in cancelled:
            self.report_dropped(DropReason.CANCELLED, texts, request)
        expired = self.queue.drop(lambda request: _expired(request.batch, now))
        for request, texts in expired:
            self.report_dropped(DropReason.EXPIRED, texts, request)
            request.answer(DeadlineExceededError("The request's deadline passed in the queue."))
        if cancelled or expired:
            self.report()  # here: nothing may be left to take, and the lane waits
        return bool(cancelled or expired)

    def fail(self, failed: Iterable[Request], error: Exception) -> None:
        """Answer requests with an error, and drop their waiting texts."""
        requests = set(failed)
        with self.lock:
            waiting = dict(self.queue.drop(lambda request: request in requests))
            self.report()
        for request in requests:
            request.withdrawn = True
            self.report_dropped(DropReason.FAILED, 1 + waiting.get(request, 0), request)
            request.answer(
                error
                if isinstance(error, TaskvecError)
                else TaskvecError("The engine failed on this batch; see the log for the reason.")
            )

    def report(self) -> None:
        """Report the state of the queue to the observer; the caller holds the lock."""
        if self.observer is not None:
            oldest = self.queue.oldest
            since = None if oldest is None else oldest.queued_at
            self.observer.queue_changed(self.queue.texts, self.queue.tokens, since)

    def report_dropped(self, reason: DropReason, texts: int, request: Request) -> None:
        """Report texts that leave the queue without being embedded."""
        log.info("texts_dropped", reason=reason, texts=texts, of=len(request.order))
        if self.observer is not None:
            self.observer.texts_dropped(reason, texts)


@dataclass(eq=False, slots=True)
class Worker:
    """Computes the batches of one lane; all methods run on its thread.

    Attributes:
        lane: its lane.
        lanes: all lanes.
        waiting: the waiting requests.
        transformer: the forward pass.
        counts_processor: whether processor time says how long a forward pass takes: the processor
            computes, and has no quota.
        computing: the requests of the batches that are started or about to be.
    """

    lane: Lane
    lanes: Lanes[Request]
    waiting: WaitingRequests
    transformer: AnyTransformer
    counts_processor: bool = False
    computing: set[Request] = field(default_factory=set)
    _in_flight: deque[Batch] = field(default_factory=deque)
    _budget: int = 0
    _taking: bool = False
    _taken_seconds: float = 0.0
    _finished_seconds: float = 0.0
    _trimmed_at: float = 0.0

    def run(self) -> None:
        """Run batches until the engine stops; on a GPU, start one while another is computed."""
        while True:
            try:
                if not self._run_once():
                    return
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                error.__traceback__ = None  # its frames reference what takes memory
                self._give_up()

    def _run_once(self) -> bool:
        """Start the next batch, or finish the oldest; return whether there was any."""
        in_flight = self._in_flight
        rows = self._next_batch(wait=not in_flight)
        if rows:
            self._report_started(rows)
            self._start(rows)
        elif not in_flight:
            return False
        if in_flight and (len(in_flight) >= self.transformer.max_started or not rows):
            self._finish(in_flight.popleft())
        self.computing = {request for batch in in_flight for request, _ in batch.rows}
        if time.monotonic() - self._trimmed_at >= TRIM_INTERVAL_SECONDS:
            trim_malloc()
            self._trimmed_at = time.monotonic()
        return True

    def _give_up(self) -> None:
        """Fail the requests of this lane, because an allocation outside a forward pass failed.

        Raises:
            RuntimeError: which requests they are is not known.
        """
        if self._taking:
            raise RuntimeError("memory ran out while it took requests from the queue")
        for batch in self._in_flight:
            with suppress(Exception):
                batch.wait()
        self._in_flight.clear()
        with self.waiting.lock:
            self.lanes.abandon(self.lane)
        log.warning("memory_ran_out_outside_a_forward_pass", requests=len(self.computing))
        self.waiting.fail(self.computing, _no_memory())
        self.computing = set()

    def _next_batch(self, *, wait: bool) -> list[Row]:
        """Return the next batch, or an empty list if there is none.

        Args:
            wait: True to wait for a batch; the list is then empty only if the engine has stopped.
        """
        queue = self.waiting.queue
        with self.waiting.lock:
            try:
                taken = self._take(wait=wait)
            except MemoryError:
                # Which of the waiting requests have lost texts is not known.
                self.computing = self.computing.union(queue.clear(self.lane.classes))
                self._taking = False
                raise
        return [(request, request.order[index]) for request, index in taken]

    def _take(self, *, wait: bool) -> list[tuple[Request, int]]:
        """Take the next batch from the queue; the caller holds the lock."""
        waiting = self.waiting
        self._taking = True
        while True:
            if waiting.drop_abandoned():
                self.lanes.notify()
            waiting.budget.grow()
            taken = self.lanes.take(self.lane, waiting.budget.tokens)
            if taken or not wait or self._is_done():
                break
            self.lane.wake.wait()
        self._budget = waiting.budget.tokens
        self._taken_seconds = self.lane.seconds
        self.computing = self.computing.union(request for request, _ in taken)
        waiting.queue.forget()
        waiting.report()
        self._taking = False
        return taken

    def _is_done(self) -> bool:
        return self.waiting.stopping and not any(map(self.waiting.queue.waits, self.lane.classes))

    def _report_started(self, rows: Sequence[Row]) -> None:
        now = time.monotonic()
        waited = []
        for request, _ in rows:
            if request.started_at is None:
                request.started_at = now
                request.batch.entered()
                waited.append(now - request.queued_at)
        if self.waiting.observer is not None:
            self.waiting.observer.batch_started(waited)

    def _start(self, rows: Sequence[Row]) -> None:
        """Start the forward pass of a batch that the lane has taken."""
        batch = self._launch(rows)
        if batch is None:
            self._end_batch()
        else:
            self._in_flight.append(batch)

    def _forward(self, rows: Sequence[Row]) -> None:
        """Embed texts in one forward pass, or in several smaller ones if memory runs out."""
        batch = self._launch(rows)
        if batch is not None:
            self._answer(batch)

    def _launch(self, rows: Sequence[Row]) -> Batch | None:
        """Start a forward pass; returns None if nothing is left to wait for."""
        rows = [row for row in rows if not row[0].withdrawn]
        if not rows:
            return None
        ids = [request.batch.ids[i] for request, i in rows]
        lane_seconds = self.lane.seconds
        processor = time.thread_time()
        try:
            wait = self.transformer.start(ids, [request.batch.adapter for request, _ in rows])
        except Exception as error:  # noqa: BLE001 - reported to the callers
            self._handle_failure(rows, error)
            return None
        processor = time.thread_time() - processor if self.counts_processor else math.inf
        return Batch(rows, self._budget, lane_seconds, processor, wait)

    def _finish(self, batch: Batch) -> None:
        """Wait for the oldest forward pass, answer its requests, and let other lanes go on."""
        self._answer(batch)
        self._end_batch()

    def _end_batch(self) -> None:
        with self.waiting.lock:
            paused = self.lanes.finish(self.lane)
        if paused and self.waiting.observer is not None:
            self.waiting.observer.forward_paused(self.lane.seconds - self._taken_seconds)

    def _answer(self, batch: Batch) -> None:
        """Wait for a forward pass and answer the requests whose last text it contained."""
        rows = batch.rows
        try:
            vectors = batch.wait()
        except Exception as error:  # noqa: BLE001 - reported to the callers
            self._handle_failure(rows, error)
            return
        with self.waiting.lock:
            self.lanes.charge()
            self.waiting.finished += len(rows)
        tokens = sum(len(request.batch.ids[i]) for request, i in rows)
        self.waiting.proven_tokens = max(self.waiting.proven_tokens, tokens)
        seconds = self.lane.seconds - max(batch.lane_seconds, self._finished_seconds)
        self._finished_seconds = self.lane.seconds
        if self.waiting.observer is not None:
            self.waiting.observer.batch_finished(len(rows), tokens, seconds, batch.budget)
        for request in {request for request, _ in rows}:
            request.forward += seconds
            request.processor += batch.processor
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
                        forward=request.forward,
                        processor=request.processor,
                    )
                )

    def _handle_failure(self, rows: Sequence[Row], failure: Exception) -> None:
        if is_out_of_memory(failure):
            failure.__traceback__ = None  # its frames reference tensors of the forward pass
            self._retry(rows, failure)
        else:
            log.error("forward_failed", texts=len(rows), exc_info=failure)
            self.waiting.fail([request for request, _ in rows], failure)

    def _retry(self, rows: Sequence[Row], failure: Exception) -> None:
        """Compute texts again for which memory ran out: alone, and then in smaller batches."""
        while self._in_flight:  # they are being computed, and must not wait for this batch
            self._finish(self._in_flight.popleft())
        release_memory(self.transformer.device)
        if self.lanes.wait_alone(self.lane):
            log.warning("memory_ran_out_beside_another_batch", texts=len(rows))
            self._forward(rows)
        else:
            self._split(rows, failure)

    def _split(self, rows: Sequence[Row], failure: Exception) -> None:
        tokens = sum(len(request.batch.ids[i]) for request, i in rows)
        with self.waiting.lock:
            budget = self.waiting.budget
            budget.shrink(tokens)
            self._budget = budget.tokens
        log.warning(
            "memory_ran_out",
            texts=len(rows),
            tokens=tokens,
            max_batch_tokens=budget.tokens,
            reason=str(failure).partition("\n")[0],
        )
        if self.waiting.observer is not None:
            self.waiting.observer.memory_ran_out(budget.tokens)
        if len(rows) == 1:
            request, i = rows[0]
            self.waiting.fail(
                [request],
                _no_memory()
                if tokens <= self.waiting.proven_tokens
                else TaskvecError(
                    f"input[{i}] has {tokens} tokens, which do not fit into the engine's memory "
                    "even alone: send a shorter text, or ask the operator for more memory.",
                    code="out_of_memory",
                    param=f"input[{i}]",
                ),
            )
            return
        middle = len(rows) // 2
        self._forward(rows[:middle])
        self._forward(rows[middle:])


def _no_memory() -> OverloadedError:
    return OverloadedError(
        "The engine has no memory left for the request: send it again later.", retry_after=1
    )


def _expired(batch: TokenBatch, now: float) -> bool:
    return batch.deadline is not None and now > batch.deadline
