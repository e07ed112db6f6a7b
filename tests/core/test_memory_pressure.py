"""Memory pressure: levels by what is free, trimmed before, left late, logged once."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from cgroups import MB, Cgroup
from taskvec.core.memory_budget import MemoryBudget
from taskvec.core.memory_pressure import MemoryPressure, PressureLevel
from taskvec.errors import OverloadedError, QueueFullError
from taskvec.memory_limits import MemoryUse

LIMIT = 2000 * MB


class Machine:
    """A cgroup of 2,000 MB, a clock, and an allocator that may have something to return."""

    def __init__(self, folder: Path, limit: int = LIMIT) -> None:
        self.cgroup = Cgroup(folder, limit)
        self.budget = MemoryBudget(100 * MB)
        self.now = 0.0
        self.trims = 0
        self.after_trim: int | None = None
        self.engine: MemoryUse | None = None
        self.seen: list[tuple[MemoryUse | None, int, int]] = []
        self.pressure = MemoryPressure(
            self.cgroup.limits,
            self.budget,
            self,
            trim=self.trim,
            clock=lambda: self.now,
            engine=lambda: self.engine,
        )

    def memory_read(self, use: MemoryUse | None, level: int, held: int) -> None:
        self.seen.append((use, level, held))

    def trim(self) -> None:
        self.trims += 1
        if self.after_trim is not None:
            self.cgroup.use(self.after_trim)

    async def read_at(self, used: int) -> PressureLevel:
        """Return the level once so many megabytes are used, ten seconds later."""
        self.now += 10
        self.cgroup.use(used * MB, cache=100 * MB)
        await self.pressure.read()
        return self.pressure.level


@pytest.mark.anyio
async def test_levels_rise_at_their_thresholds_and_fall_later(tmp_path: Path) -> None:
    """Bulk is refused from 85 %, embedding from 90 %, all from 95 %; each level ends 3 % below."""
    machine = Machine(tmp_path)
    expected = [
        (1690, PressureLevel.NONE),
        (1710, PressureLevel.BULK),
        (1690, PressureLevel.BULK),
        (1790, PressureLevel.BULK),
        (1810, PressureLevel.EMBEDDING),
        (1910, PressureLevel.ALL),
        (1850, PressureLevel.ALL),
        (1830, PressureLevel.EMBEDDING),
        (1750, PressureLevel.EMBEDDING),
        (1730, PressureLevel.BULK),
        (1650, PressureLevel.BULK),
        (1630, PressureLevel.NONE),
    ]
    assert [(used, await machine.read_at(used)) for used, _ in expected] == expected


@pytest.mark.anyio
async def test_the_limit_of_the_engines_process_counts_one_level_less(tmp_path: Path) -> None:
    """Below 10 and 5 % of its own limit, bulk and embedding requests are refused, nothing else."""
    machine = Machine(tmp_path)
    expected = [
        (890, PressureLevel.NONE),
        (910, PressureLevel.BULK),
        (960, PressureLevel.EMBEDDING),
        (1000, PressureLevel.EMBEDDING),
        (910, PressureLevel.BULK),
        (860, PressureLevel.NONE),
    ]
    for used, level in expected:
        machine.engine = MemoryUse("engine", 1000 * MB, used * MB)
        assert await machine.read_at(100) is level, used
        assert machine.seen[-1][0] == machine.engine
        assert not machine.trims, "what this process has free does not help the other one"
    assert await machine.read_at(1910) is PressureLevel.ALL
    assert machine.seen[-1][0] != machine.engine
    machine.engine = None
    assert await machine.read_at(100) is PressureLevel.NONE


@pytest.mark.anyio
async def test_a_large_limit_keeps_no_more_free_than_requests_need(tmp_path: Path) -> None:
    """With 100 GB, the levels begin at 768, 512 and 256 MB."""
    machine = Machine(tmp_path, 100_000 * MB)
    for free, level in [(780, 0), (760, 1), (520, 1), (500, 2), (250, 3)]:
        assert await machine.read_at(100_000 - free) == level, free


@pytest.mark.anyio
async def test_free_pages_are_returned_before_anything_is_refused(tmp_path: Path) -> None:
    """What the allocator retains is no use: the level rises only if trimming does not help."""
    machine = Machine(tmp_path)
    machine.after_trim = 1000 * MB
    assert await machine.read_at(1950) is PressureLevel.NONE
    assert machine.trims == 1
    machine.after_trim = None
    assert await machine.read_at(1950) is PressureLevel.ALL
    machine.now += 0.1
    await machine.pressure.read()
    assert machine.trims == 2  # at most once a second
    machine.now += 1.0
    await machine.pressure.read()
    assert machine.trims == 3  # again as long as it lasts


@pytest.mark.anyio
async def test_each_level_refuses_what_it_says(tmp_path: Path) -> None:
    """Every refusal names the code and when to retry; at the last level the budget is closed."""
    machine = Machine(tmp_path)
    pressure = machine.pressure
    pressure.require_embedding(bulk=True)
    await machine.read_at(1710)
    pressure.require_embedding(bulk=False)
    with pytest.raises(QueueFullError) as refused:
        pressure.require_embedding(bulk=True)
    assert (refused.value.code, refused.value.retry_after) == ("overloaded", 2.0)
    await machine.read_at(1810)
    with pytest.raises(QueueFullError):
        pressure.require_embedding(bulk=False)
    pressure.require_any()
    assert not machine.budget.closed
    await machine.read_at(1950)
    with pytest.raises(OverloadedError) as overloaded:
        pressure.require_any()
    assert (overloaded.value.status, overloaded.value.code) == (503, "overloaded")
    assert machine.budget.closed
    await machine.read_at(100)
    pressure.require_any()
    assert not machine.budget.closed


@pytest.mark.anyio
async def test_readiness_ends_at_the_last_level_or_after_half_a_minute(tmp_path: Path) -> None:
    """A short shortage is answered like a full queue; a long one sends clients elsewhere."""
    machine = Machine(tmp_path)
    await machine.read_at(1810)
    assert not machine.pressure.unready
    machine.now += 25
    assert not machine.pressure.unready
    machine.now += 10
    assert machine.pressure.unready
    await machine.read_at(1710)
    assert not machine.pressure.unready
    await machine.read_at(1950)
    assert machine.pressure.unready


@pytest.mark.anyio
async def test_changes_are_logged_once_and_reported_always(tmp_path: Path) -> None:
    """A log line has the limit, its use and what is refused; metrics get each reading."""
    machine = Machine(tmp_path)
    with capture_logs() as lines:
        for used in (100, 1810, 1810, 1810, 100, 100):
            await machine.read_at(used)
    assert [(line["log_level"], line["refused"]) for line in lines] == [
        ("warning", "embedding"),
        ("info", "none"),
    ]
    assert (lines[0]["limit_mb"], lines[0]["used_mb"]) == (2000, 1810)
    assert lines[0]["limit"].endswith("pod/memory.max")
    assert [level for _, level, _ in machine.seen] == [0, 2, 2, 2, 0, 0]


@pytest.mark.anyio
async def test_without_a_limit_nothing_is_refused(tmp_path: Path) -> None:
    """A machine's own memory is shared with others and is no limit of the process."""
    machine = Machine(tmp_path)
    (tmp_path / "cgroups/pod/memory.max").write_text("max\n")
    assert await machine.read_at(10**9) is PressureLevel.NONE
    assert machine.seen == [(None, 0, 0)]


@pytest.mark.anyio
async def test_readings_do_not_wait_for_large_requests(tmp_path: Path) -> None:
    """They have a thread of their own, which ends with ``close``."""
    machine = Machine(tmp_path)
    before = set(threading.enumerate())
    ended = threading.Event()
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1) as busy:
        loop.set_default_executor(busy)
        waiting = loop.run_in_executor(None, ended.wait)
        try:
            async with asyncio.timeout(10):
                assert await machine.read_at(1810) is PressureLevel.EMBEDDING
        finally:
            ended.set()
        await waiting
    (own,) = (
        thread
        for thread in set(threading.enumerate()) - before
        if thread.name.startswith("memory-pressure")
    )
    machine.pressure.close()
    own.join(10)
    assert not own.is_alive()
