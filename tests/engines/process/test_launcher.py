"""Launching the engine process: how its end is told, and when no other one is launched."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import pytest

from processes import command_of, wait_for
from taskvec.engines.process import launcher as module
from taskvec.engines.process.launcher import MAX_FAILED_STARTS, EngineLauncher
from taskvec.errors import StartError

pytestmark = pytest.mark.anyio

EXITS = (sys.executable, "-c", "import sys; sys.exit(7)")
SLEEPS = (sys.executable, "-c", "import time; time.sleep(60)")


def launcher(*command: str) -> EngineLauncher:
    return EngineLauncher(command, os.environ)


async def test_processes_that_never_become_ready_are_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After some processes in a row that ended before they were ready, there is an error."""
    monkeypatch.setattr(module, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(module, "MAX_PAUSE_SECONDS", 0.001)
    launched = launcher(*EXITS)
    launched.launch()
    for _ in range(MAX_FAILED_STARTS):
        (await launched.open()).close()
        assert await launched.ended(ready=False) == "ended with code 7"
    with pytest.raises(StartError, match=f"{MAX_FAILED_STARTS} times .* ended with code 7"):
        await launched.open()


async def test_a_ready_process_resets_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that were ready are replaced without end, after pauses that grow to a limit."""
    monkeypatch.setattr(module, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(module, "MAX_PAUSE_SECONDS", 0.004)
    launched = launcher(*EXITS)
    launched.launch()
    for _ in range(2 * MAX_FAILED_STARTS):
        (await launched.open()).close()
        await launched.ended(ready=True)


async def test_the_signal_that_killed_it_is_told() -> None:
    """SIGKILL, which is what a lack of memory looks like, is named as such."""
    launched = launcher(*SLEEPS)
    launched.launch()
    (await launched.open()).close()
    assert launched.pid is not None
    os.kill(launched.pid, signal.SIGKILL)
    reason = await launched.ended(ready=True)
    assert reason == "killed by SIGKILL, as the system does when memory runs out"
    assert launched.pid is None


async def test_an_error_after_its_end_does_not_stop_the_launches() -> None:
    """A process whose end nobody has waited for, because of an error, is replaced all the same."""
    launched = launcher(*SLEEPS)
    restarts: list[int | None] = []
    launched.on_restart(lambda: restarts.append(launched.pid))
    launched.launch()
    (await launched.open()).close()
    first = launched.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    async with asyncio.timeout(10):
        (await launched.open()).close()
    assert launched.pid not in {first, None}
    assert restarts == [launched.pid]
    launched.kill()


async def test_no_process_is_launched_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher that is closed during the pause before a process launches none."""
    monkeypatch.setattr(module, "FIRST_PAUSE_SECONDS", 0.2)
    launched = launcher(*EXITS)
    launched.launch()
    (await launched.open()).close()
    await launched.ended(ready=True)
    opening = asyncio.create_task(launched.open())
    await asyncio.sleep(0.1)
    await launched.close()
    await asyncio.sleep(0.3)
    assert launched.pid is None
    opening.cancel()


def test_a_first_launch_that_fails_is_a_sentence() -> None:
    """A system that has nothing for a process gives an error that says what to do."""
    with pytest.raises(StartError, match="cannot be launched \\(No such file"):
        launcher("/no/such/command").launch()


@pytest.mark.parametrize("way", ["kill", "close", "ended"])
async def test_no_process_is_left(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """A process that does not end when it should is killed."""
    monkeypatch.setattr(module, "STOP_SECONDS", 0.2)
    monkeypatch.setattr(module, "EXIT_SECONDS", 0.2)
    launched = launcher(*SLEEPS)
    launched.launch()
    pid = launched.pid
    assert pid is not None
    wait_for(lambda: "sleep" in command_of(pid))
    if way == "kill":
        launched.kill()
    elif way == "close":
        await launched.close()
    else:
        await launched.ended(ready=True)
    assert command_of(pid) == ""


async def test_a_command_that_does_not_exist_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that launches no process is an error as well, after some tries."""
    monkeypatch.setattr(module, "FILE_RETRY_SECONDS", 0.001)
    async with asyncio.timeout(10):
        with pytest.raises(StartError, match="not launched"):
            await launcher("/no/such/command").open()
