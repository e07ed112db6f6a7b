"""Background tasks: started again after errors and ends, and given up after many."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from structlog.testing import capture_logs

from fakes import FakeEngine
from taskvec.api.app import create_app
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.concurrency import (
    MAX_ENDS,
    MAX_FAILURES,
    BackgroundTaskError,
    BackgroundTasks,
)
from taskvec.errors import StartError
from taskvec.service import build_service, key_source
from taskvec.settings import Settings

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def quick_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks are restarted at once."""
    monkeypatch.setattr("taskvec.concurrency.FIRST_RESTART_SECONDS", 0.01)


async def test_the_pause_grows_to_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that always fails is restarted less and less often, and stays at the limit."""
    monkeypatch.setattr("taskvec.concurrency.MAX_RESTART_SECONDS", 0.04)

    async def run() -> None:
        raise RecursionError

    tasks = BackgroundTasks(lambda _: None)
    with capture_logs() as lines:
        tasks.start("watch", run)
        async with asyncio.timeout(10):
            while len(lines) < 6:
                await asyncio.sleep(0.01)
    await tasks.stop()
    assert [line["restart_seconds"] for line in lines[:6]] == [0.01, 0.02, 0.04, 0.04, 0.04, 0.04]


async def test_a_task_is_restarted_after_an_error() -> None:
    """An unexpected error is logged with the task's name, and the task runs again."""
    ended: list[str] = []
    runs = 0

    async def run() -> None:
        nonlocal runs
        runs += 1
        if runs < 3:
            raise RecursionError
        await asyncio.Event().wait()

    tasks = BackgroundTasks(ended.append)
    with capture_logs() as lines:
        tasks.start("watch", run)
        async with asyncio.timeout(10):
            while runs < 3:
                await asyncio.sleep(0.01)
    await tasks.stop()
    assert [(line["event"], line["task"]) for line in lines] == [
        ("background_task_failed", "watch")
    ] * 2
    assert ended == []


@pytest.mark.parametrize("may_end", [True, False])
async def test_a_task_that_returns(*, may_end: bool) -> None:
    """A task that returns is started again a few times and then given up, unless it may end."""
    ended: list[BackgroundTaskError] = []
    runs = 0

    async def run() -> None:
        nonlocal runs
        runs += 1

    tasks = BackgroundTasks(ended.append)
    tasks.start("measure", run, may_end=may_end)
    await asyncio.sleep(0.05)
    assert runs == (1 if may_end else 1 + MAX_ENDS)
    assert len(ended) == (0 if may_end else 1)
    await tasks.stop()


async def test_a_task_that_always_fails_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """After many errors in a row the process is to be replaced."""
    monkeypatch.setattr("taskvec.concurrency.MAX_RESTART_SECONDS", 0.01)
    ended: list[BackgroundTaskError] = []
    runs = 0

    async def run() -> None:
        nonlocal runs
        runs += 1
        raise RecursionError

    tasks = BackgroundTasks(ended.append)
    tasks.start("watch", run)
    async with asyncio.timeout(10):
        while not ended:
            await asyncio.sleep(0.01)
    assert runs == MAX_FAILURES
    assert "'watch' cannot be kept running" in str(ended[0])
    await tasks.stop()


async def test_a_task_that_somebody_cancels_is_started_again(
    default_checkpoint: Checkpoint,
) -> None:
    """The service stays ready; one that is cancelled again and again ends the process."""
    failures: list[BaseException] = []
    engine = FakeEngine(default_checkpoint.card)
    service = build_service(Settings(), checkpoint=default_checkpoint, engine=engine)
    app = create_app(service, failures.append)
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        for cancelled in range(MAX_ENDS + 1):
            await asyncio.sleep(0.05)
            assert (await client.get("/health/ready")).status_code == 200, cancelled
            assert failures == []
            (task,) = [task for task in asyncio.all_tasks() if task.get_name() == "watch engine"]
            task.cancel()
        await asyncio.sleep(0.05)
        assert [type(failure) for failure in failures] == [BackgroundTaskError]
        answer = await client.get("/health/ready")
        assert answer.status_code == 503
        assert "'watch engine' cannot be kept running" in answer.json()["error"]["message"]
        reply = await client.post("/v1/embeddings", json={"input": "a"})
        assert reply.status_code == 200  # until the process has drained


@pytest.mark.parametrize("name", ["TASKVEC_API_KEYS", "TASKVEC_KEYS_FILE"])
def test_an_empty_variable_for_keys_ends_the_start(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A variable for keys that is set and empty does not serve without keys in silence."""
    monkeypatch.setenv(name, "")
    with pytest.raises(StartError, match=f"{name} is set and empty"):
        key_source(Settings())


def test_other_processes_are_given_no_empty_keys() -> None:
    """Settings without keys give another process no empty variable for keys."""
    assert not {"TASKVEC_API_KEYS", "TASKVEC_KEYS_FILE"} & set(Settings().environment())
