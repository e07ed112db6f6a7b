"""Fair queue of tokenising requests, and the threads that serve it.

A request is tokenised in slices of some milliseconds. After each slice the thread takes the request
of its class that has received the least time: start-time fair queueing (Goyal, Vin and Cheng,
1996), by the seconds that slices took. So a new request waits for the slices that are running, not
for the requests that came before it, whatever their texts cost. The classes share the threads by
their weights (``taskvec.priority``).

What waits is limited in characters by class; a full class still admits a client that has less than
its share (``core.client_shares``). A request that is cancelled gets no further slice.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from taskvec.concurrency import is_shortage, lower_priority
from taskvec.core.admission import MAX_RETRY_AFTER
from taskvec.core.client_shares import ClientShares, current_client
from taskvec.errors import QueueFullError
from taskvec.priority import WEIGHTS, Priority

MAX_REQUESTS = 1 << 62
"""No limit: the requests in progress are limited elsewhere."""

RATE_WINDOW = 30.0
"""Time constant of the measured rate's moving average, in seconds of a thread's work."""

NICE = 10
"""What the threads add to their nice value. At equal priority, a forward pass of two threads took
five times as long beside two of them on two cores, because its threads wait for each other; at 19,
tokenising beside bulk forward passes took three times as long."""


class SlicedWork(Protocol):
    """Work that is done in slices, by one thread at a time."""

    def step(self) -> tuple[int, bool]:
        """Do one slice; return the characters that it was given, and whether all is done."""


@dataclass(eq=False, slots=True)
class _Request:
    """A request in the queue.

    Attributes:
        work: None once the request has ended, so that its texts are freed.
        received: virtual time of the class at the arrival, plus the seconds received since.
    """

    work: SlicedWork | None
    priority: Priority
    received: float
    arrival: int
    ended: Future[None] = field(default_factory=Future)

    def __lt__(self, other: _Request) -> bool:
        return (self.received, self.arrival) < (other.received, other.arrival)


@dataclass(eq=False, slots=True)
class _ClassQueue:
    """Requests of one priority class.

    Attributes:
        waiting: requests without a thread, as a heap.
        requests: requests that have not ended.
        characters: their characters.
        virtual_time: seconds that a request present from the start should have received.
        weighted_seconds: seconds used by this class, divided by its weight.
        shares: what each client has of the characters; only the event loop uses it.
    """

    waiting: list[_Request] = field(default_factory=list)
    requests: int = 0
    characters: int = 0
    virtual_time: float = 0.0
    weighted_seconds: float = 0.0
    shares: ClientShares = field(default_factory=ClientShares)


class TokenizerQueue:
    """Runs sliced work in threads; used by one event loop."""

    def __init__(
        self,
        threads: int,
        max_characters: int,
        changed: Callable[[int, int], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Start with nothing queued; threads start when they are needed.

        Args:
            threads: requests served at the same time.
            max_characters: characters of one class that are queued or being tokenised. A larger
                request is admitted if its class is empty: its size is limited elsewhere.
            changed: called from any thread with the numbers of busy threads and waiting requests.
            clock: returns seconds.
        """
        self._pool = ThreadPoolExecutor(
            threads, thread_name_prefix="tokenizer", initializer=partial(lower_priority, NICE)
        )
        self._threads = threads
        self._max_characters = max_characters
        self._changed = changed
        self._clock = clock
        self._lock = threading.Lock()
        self._classes = {priority: _ClassQueue() for priority in Priority}
        self._weighted_seconds = 0.0  # where a class starts that had no requests
        self._arrivals = 0
        self._workers = self._failed_starts = 0
        self._characters_done = self._seconds = 0.0
        self._closed = False

    async def run(self, work: SlicedWork, characters: int, priority: Priority) -> None:
        """Do work in its turns; cancelling the call ends it after the running slice.

        Args:
            work: what to do.
            characters: price of the work.
            priority: class of the request.

        Raises:
            QueueFullError: too many characters are queued; states when to retry.
            RuntimeError: there is no thread, and the system has none left.
        """
        queue = self._classes[priority]
        client = current_client.get()
        with self._lock:
            full = bool(queue.characters) and (queue.characters + characters > self._max_characters)
            if full and not queue.shares.admits(
                client, characters, self._max_characters, MAX_REQUESTS
            ):
                raise self._full(characters, priority)
            self._start_thread()
            request = self._push(work, queue, characters, priority)
        try:
            with queue.shares.hold(client, characters, beyond=full):
                await asyncio.wrap_future(request.ended)
        finally:
            with self._lock:
                request.work = None
                queue.requests -= 1
                queue.characters -= characters
                self._report()
            # An error refers to this frame, and the request to the error: in a cycle, the texts of
            # the request would be kept until the next garbage collection.
            del request

    def close(self) -> None:
        """End the threads after the slices that are running, and cancel what waits."""
        with self._lock:
            self._closed = True
            waiting = [request for queue in self._classes.values() for request in queue.waiting]
        for request in waiting:
            request.ended.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _push(
        self, work: SlicedWork, queue: _ClassQueue, characters: int, priority: Priority
    ) -> _Request:
        if not queue.requests:  # a class saves up no time while it has no requests
            queue.weighted_seconds = max(queue.weighted_seconds, self._weighted_seconds)
        queue.requests += 1
        queue.characters += characters
        self._arrivals += 1
        request = _Request(work, priority, queue.virtual_time, self._arrivals)
        heapq.heappush(queue.waiting, request)
        self._report()
        return request

    def _start_thread(self) -> None:
        """Start a thread if there may be another one; the caller holds the lock.

        Raises:
            RuntimeError: the system has no thread left, and no other one serves.
        """
        if self._workers >= self._threads:
            return
        try:
            self._pool.submit(self._serve)
        except (RuntimeError, MemoryError) as error:
            if not is_shortage(error):
                raise
            if isinstance(error, RuntimeError):
                self._failed_starts += 1  # a thread that the pool starts later does this work
            if not self._workers:
                raise
        else:
            self._workers += 1

    def _serve(self) -> None:
        """Serve slices until none waits."""
        with self._lock:
            if self._failed_starts:
                self._failed_starts -= 1
                self._workers += 1
        while True:
            with self._lock:
                request = self._take()
                if request is None:
                    self._workers -= 1
                    self._report()
                    return
                work = request.work
            if work is None:
                continue
            began = self._clock()
            characters, done, error = 0, True, None
            try:
                characters, done = work.step()
            except BaseException as raised:  # noqa: BLE001 - it belongs to the request's caller
                error = raised
            with self._lock:
                self._charge(request, characters, self._clock() - began)
                if not done and not self._closed:
                    heapq.heappush(self._classes[request.priority].waiting, request)
                    continue
            _end(request.ended, error, done=done)
            del request, work, error

    def _take(self) -> _Request | None:
        """Remove and return the next request to serve."""
        while not self._closed:
            queues = [queue for queue in self._classes.values() if queue.waiting]
            if not queues:
                return None
            queue = min(queues, key=lambda queue: queue.weighted_seconds)
            request = heapq.heappop(queue.waiting)
            if request.work is not None and not request.ended.cancelled():
                queue.virtual_time = max(queue.virtual_time, request.received)
                return request
        return None

    def _charge(self, request: _Request, characters: int, seconds: float) -> None:
        queue = self._classes[request.priority]
        request.received += seconds
        # New requests start here. Without this, a stream of them would keep one that has had a
        # slice waiting for ever; with the share of one request more, a new one is served next.
        queue.virtual_time += seconds / (queue.requests + 1)
        queue.weighted_seconds += seconds / WEIGHTS[request.priority]
        active = [queue, *(other for other in self._classes.values() if other.requests)]
        least = min(other.weighted_seconds for other in active)
        self._weighted_seconds = max(self._weighted_seconds, least)
        decay = math.exp(-seconds / RATE_WINDOW)
        self._characters_done = self._characters_done * decay + characters
        self._seconds = self._seconds * decay + seconds

    def _full(self, characters: int, priority: Priority) -> QueueFullError:
        held = self._classes[priority].characters
        seconds = 1.0
        if self._characters_done:
            excess = min(held, held + characters - self._max_characters)
            rate = self._threads * self._characters_done / self._seconds
            seconds = min(MAX_RETRY_AFTER, max(1.0, excess / rate))
        return QueueFullError(
            f"{held} characters of {priority} requests are waiting for the tokenizer, and "
            f"{characters} more would exceed the limit of {self._max_characters}: send it again "
            "later.",
            retry_after=seconds,
        )

    def _report(self) -> None:
        requests = sum(queue.requests for queue in self._classes.values())
        busy = min(requests, self._workers, self._threads)
        self._changed(busy, requests - busy)


def _end(ended: Future[None], error: BaseException | None, *, done: bool) -> None:
    """Set the result of a request, unless its caller has gone."""
    try:
        if error is not None:
            ended.set_exception(error)
        elif done:
            ended.set_result(None)
        else:
            ended.cancel()
    except InvalidStateError:
        return
