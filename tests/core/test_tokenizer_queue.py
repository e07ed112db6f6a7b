"""The tokenizer's queue: turns, classes, limits, and requests whose callers have gone."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import AsyncIterator

import pytest

from taskvec.core.client_shares import current_client
from taskvec.core.tokenizer_queue import NICE, TokenizerQueue
from taskvec.errors import QueueFullError
from taskvec.priority import Priority

INTERACTIVE, BULK = Priority

LIMIT = 1000


class Work:
    """A number of slices, each of which sleeps and writes the name of its request down."""

    def __init__(self, name: str, slices: int, log: list[str], seconds: float = 0.001) -> None:
        self.name = name
        self.left = slices
        self.log = log
        self.seconds = seconds
        self.running = 0

    def step(self) -> tuple[int, bool]:
        self.running += 1
        assert self.running == 1, "two threads in one request"
        self.log.append(self.name)
        time.sleep(self.seconds)
        self.left -= 1
        self.running -= 1
        return 10, self.left == 0


class FailingWork(Work):
    def step(self) -> tuple[int, bool]:
        super().step()
        raise ValueError(self.name)


class Threads:
    """What the queue reports: the numbers of busy threads and of waiting requests."""

    def __init__(self) -> None:
        self.reports: list[tuple[int, int]] = []

    def __call__(self, busy: int, waiting: int) -> None:
        self.reports.append((busy, waiting))


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def threads() -> Threads:
    return Threads()


@pytest.fixture
async def queue(threads: Threads) -> AsyncIterator[TokenizerQueue]:
    """A queue with one thread."""
    queue = TokenizerQueue(1, LIMIT, threads)
    yield queue
    queue.close()


async def started(log: list[str], slices: int = 1) -> None:
    async with asyncio.timeout(10):
        while len(log) < slices:
            await asyncio.sleep(0.001)


@pytest.mark.anyio
async def test_work_is_done_to_its_end(queue: TokenizerQueue, log: list[str]) -> None:
    """All slices of all requests are done, and each caller returns after the last of its own."""
    works = [Work(str(n), n, log, 0) for n in range(1, 30)]
    await asyncio.gather(*(queue.run(work, 1, INTERACTIVE) for work in works))
    assert [work.left for work in works] == [0] * 29
    assert len(log) == sum(range(30))


@pytest.mark.anyio
async def test_a_lack_of_threads_leaves_the_queue_as_it_was(
    threads: Threads, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests for which no thread can be started fail; later ones are done, and none is lost."""
    queue = TokenizerQueue(2, LIMIT, threads)

    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        for _ in range(5):
            with pytest.raises(RuntimeError, match="can't start new thread"):
                await queue.run(Work("failed", 1, log), LIMIT, INTERACTIVE)
    assert log == []
    async with asyncio.timeout(10):
        works = [Work("done", 3, log) for _ in range(6)]
        await asyncio.gather(*(queue.run(work, 1, INTERACTIVE) for work in works))
    assert log == ["done"] * 18
    await asyncio.sleep(0.05)
    await queue.run(Work("last", 1, log), 1, INTERACTIVE)
    assert all(0 <= busy <= 2 and waiting >= 0 for busy, waiting in threads.reports)
    assert threads.reports[-1] == (0, 0)
    queue.close()


@pytest.mark.anyio
async def test_a_new_request_waits_for_one_slice(queue: TokenizerQueue, log: list[str]) -> None:
    """What came before it has received more, however many requests that are."""
    tasks = [asyncio.create_task(queue.run(Work("old", 200, log), 1, INTERACTIVE)) for _ in "1234"]
    await started(log, 40)
    before = len(log)
    await queue.run(Work("new", 1, log), 1, INTERACTIVE)
    assert log[before:].index("new") <= 5
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.anyio
async def test_requests_share_the_time_not_the_slices(
    queue: TokenizerQueue, log: list[str]
) -> None:
    """Of two requests the one with expensive slices gets fewer of them."""
    slow, fast = Work("slow", 10_000, log, 0.008), Work("fast", 10_000, log, 0.002)
    tasks = [asyncio.create_task(queue.run(work, 1, INTERACTIVE)) for work in (slow, fast)]
    await started(log, 100)
    assert 2 <= log[:100].count("fast") / log[:100].count("slow") <= 5
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.anyio
async def test_short_requests_do_not_starve_a_longer_one(log: list[str]) -> None:
    """While short requests always wait, a request of several slices still gets its share."""
    queue = TokenizerQueue(1, LIMIT, lambda _busy, _waiting: None)
    ended = asyncio.Event()

    async def short() -> None:
        while not ended.is_set():
            await queue.run(Work("short", 1, log), 10, INTERACTIVE)

    clients = [asyncio.create_task(short()) for _ in range(8)]
    await started(log)
    await asyncio.wait_for(queue.run(Work("long", 5, log), 50, INTERACTIVE), 20)
    ended.set()
    await asyncio.gather(*clients)
    queue.close()
    between = len(log) - log.index("long") - log[::-1].index("long")
    assert between < 120, "five slices among eight clients: about forty slices of others"


@pytest.mark.anyio
async def test_the_classes_share_by_weight(queue: TokenizerQueue, log: list[str]) -> None:
    """Interactive requests get four fifths of the time, and bulk the rest."""
    tasks = [
        asyncio.create_task(queue.run(Work(priority, 10_000, log), 1, priority))
        for priority in (BULK, BULK, BULK, INTERACTIVE)
    ]
    await started(log, 300)
    assert 0.7 <= log[:300].count(INTERACTIVE) / 300 <= 0.9
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.anyio
async def test_a_class_that_comes_late_does_not_make_up_for_the_past(
    queue: TokenizerQueue, log: list[str]
) -> None:
    """After much interactive work alone, bulk that begins while there is none does not shut it out.

    Otherwise it would be served alone until it has had as much.
    """
    await queue.run(Work("single", 500, log), 1, INTERACTIVE)
    bulk = asyncio.create_task(queue.run(Work("bulk", 10_000, log), 1, BULK))
    await started(log, 510)
    before = len(log)
    await queue.run(Work("single", 10, log), 1, INTERACTIVE)
    assert len(log) - before <= 30
    bulk.cancel()
    await asyncio.gather(bulk, return_exceptions=True)


@pytest.mark.anyio
async def test_a_class_saves_nothing_up(queue: TokenizerQueue, log: list[str]) -> None:
    """Bulk that was alone for long does not shut out what comes later, nor the other way round."""
    bulk = asyncio.create_task(queue.run(Work("bulk", 10_000, log), 1, BULK))
    await started(log, 100)
    single = asyncio.create_task(queue.run(Work("single", 10_000, log), 1, INTERACTIVE))
    await started(log, 200)
    assert 10 <= log[100:200].count("bulk") <= 40
    for task in (bulk, single):
        task.cancel()
    await asyncio.gather(bulk, single, return_exceptions=True)


@pytest.mark.anyio
async def test_a_cancelled_request_gets_no_further_slice(
    queue: TokenizerQueue, log: list[str]
) -> None:
    """A caller that has gone frees its characters at once, and its thread after one slice."""
    gone = asyncio.create_task(queue.run(Work("gone", 10_000, log, 0.01), LIMIT, INTERACTIVE))
    await started(log)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    await queue.run(Work("next", 3, log), LIMIT, INTERACTIVE)
    await asyncio.sleep(0.05)
    assert log.count("gone") <= 3
    assert log[-3:] == ["next"] * 3


@pytest.mark.anyio
async def test_a_request_that_waits_can_be_cancelled(
    queue: TokenizerQueue, log: list[str], threads: Threads
) -> None:
    """It never gets a slice, and is no longer counted."""
    first = asyncio.create_task(queue.run(Work("first", 20, log, 0.005), 1, INTERACTIVE))
    await started(log)
    second = asyncio.create_task(queue.run(Work("second", 20, log), 1, BULK))
    await asyncio.sleep(0)
    assert threads.reports[-1] == (1, 1)
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    assert threads.reports[-1] == (1, 0)
    await first
    assert log.count("second") <= 1
    async with asyncio.timeout(10):
        while threads.reports[-1] != (0, 0):
            await asyncio.sleep(0.001)


@pytest.mark.anyio
async def test_what_waits_is_limited_by_class(queue: TokenizerQueue, log: list[str]) -> None:
    """Beyond the limit a request is refused at once; the other class, and an empty one, is not."""
    held = asyncio.create_task(queue.run(Work("held", 10_000, log), LIMIT - 1, BULK))
    await started(log, 20)
    await queue.run(Work("fits", 1, log), 1, BULK)
    with pytest.raises(QueueFullError, match=r"999 characters of bulk.* 2 more.* 1000") as refused:
        await queue.run(Work("refused", 1, log), 2, BULK)
    assert (refused.value.status, refused.value.code) == (429, "queue_full")
    assert refused.value.retry_after is not None
    assert 1 <= refused.value.retry_after <= 120
    await queue.run(Work("other class", 1, log), LIMIT, INTERACTIVE)
    await queue.run(Work("larger than the limit", 1, log), 5 * LIMIT, INTERACTIVE)
    held.cancel()
    await asyncio.gather(held, return_exceptions=True)
    await queue.run(Work("fits again", 1, log), LIMIT, BULK)
    assert "refused" not in log


@pytest.mark.anyio
async def test_a_client_that_fills_a_class_does_not_keep_others_out(
    queue: TokenizerQueue, log: list[str]
) -> None:
    """A full class admits another client up to its share, and refuses the one that fills it."""

    async def ask(client: str, characters: int) -> None:
        current_client.set(client)
        await queue.run(Work(client, 1, log, 0.05), characters, BULK)

    filling = [asyncio.create_task(ask("a", LIMIT // 2)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFullError):
        await asyncio.create_task(ask("a", 1))
    other = asyncio.create_task(ask("b", LIMIT // 2))
    await asyncio.sleep(0)
    with pytest.raises(QueueFullError):
        await asyncio.create_task(ask("b", 1))
    await asyncio.gather(*filling, other)
    assert sorted(log) == ["a", "a", "b"]


@pytest.mark.anyio
async def test_the_time_to_retry_follows_the_rate(log: list[str]) -> None:
    """At some thousand characters a second, room for 50,000 is some seconds away."""
    queue = TokenizerQueue(1, 100_000, Threads())
    held = asyncio.create_task(queue.run(Work("held", 10_000, log), 100_000, BULK))
    await started(log, 50)
    with pytest.raises(QueueFullError) as refused:
        await queue.run(Work("refused", 1, log), 50_000, BULK)
    assert refused.value.retry_after is not None
    assert 2 <= refused.value.retry_after <= 60
    held.cancel()
    await asyncio.gather(held, return_exceptions=True)
    queue.close()


@pytest.mark.anyio
async def test_an_error_reaches_its_caller_alone(queue: TokenizerQueue, log: list[str]) -> None:
    """A slice that fails ends its request; the thread goes on with the others."""
    good, bad = Work("good", 20, log), FailingWork("bad", 20, log)
    done, failed = await asyncio.gather(
        queue.run(good, 1, INTERACTIVE), queue.run(bad, 1, INTERACTIVE), return_exceptions=True
    )
    assert done is None
    assert isinstance(failed, ValueError)
    assert (log.count("bad"), log.count("good")) == (1, 20)


@pytest.mark.anyio
async def test_threads_serve_different_requests(log: list[str]) -> None:
    """Each thread has a request of its own, and they are no more than there should be."""
    queue = TokenizerQueue(3, LIMIT, Threads())
    works = [Work(str(n), 20, log) for n in range(8)]
    await asyncio.gather(*(queue.run(work, 1, INTERACTIVE) for work in works))
    assert len(log) == 8 * 20
    assert sum(thread.name.startswith("tokenizer") for thread in threading.enumerate()) >= 3
    queue.close()


@pytest.mark.skipif(sys.platform != "linux", reason="a nice value is the process's elsewhere")
@pytest.mark.anyio
async def test_the_threads_have_a_lower_priority(queue: TokenizerQueue) -> None:
    """The kernel prefers the event loop's thread, whose priority stays as it is."""

    class Nice(Work):
        value = 0

        def step(self) -> tuple[int, bool]:
            self.value = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
            return super().step()

    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    work = Nice("nice", 1, [])
    await queue.run(work, 1, INTERACTIVE)
    assert work.value == min(19, before + NICE)
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


@pytest.mark.anyio
async def test_closing_cancels_what_waits(log: list[str]) -> None:
    """Nobody waits for a queue that is closed, and its threads end."""
    queue = TokenizerQueue(1, LIMIT, Threads())
    tasks = [asyncio.create_task(queue.run(Work("w", 1000, log), 1, INTERACTIVE)) for _ in "123"]
    await started(log)
    queue.close()
    ended = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
    assert [type(end) for end in ended] == [asyncio.CancelledError] * 3
    slices = len(log)
    await asyncio.sleep(0.05)
    assert len(log) <= slices + 1
