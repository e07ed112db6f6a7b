"""Servers that misbehave, from the start or after they passed the checks."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from conftest import free_port, no_open_files
from engines.remote.peer import (
    POISON,
    Peer,
    batch,
    ended,
    joined,
    listening,
    pool,
    retried,
    serving,
    truth,
    until,
)
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.engines.base import EngineState, TokenBatch
from taskvec.engines.remote.engine import RemoteEngine
from taskvec.engines.remote.pool_server import MAX_ERRORS
from taskvec.engines.remote.protocols import DistinctVectors
from taskvec.errors import DeadlineExceededError, QueueFullError, TaskvecError, UnavailableError

OUTCOMES = {
    "wrong dimension": "wrong",
    "nan": "wrong",
    "zeros": "wrong",
    "huge": "wrong",
    "equal": "wrong",
    "wrong count": "wrong",
    "refusing": "wrong",
    "misnaming": "error",
    "endless": "wrong",
    "truncated": "unreachable",
    "closing": "unreachable",
    "silent": "timeout",
    "500": "error",
    "503": "error",
    "401": "error",
    "204": "error",
    "429": "busy",
}
PROTOCOLS = pytest.mark.parametrize("protocol", ["vllm", "taskvec"])


def checked(engine: RemoteEngine) -> bool:
    """Return whether the checks of the only server have failed with a reason."""
    reason = engine.health().reason
    return "not been checked" not in reason and "found yet" not in reason


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ("missing", "does not serve the adapters retrieval"),
        ("swapped", "adapter 'retrieval' gives the vectors of adapter 'clustering'"),
        ("base", "adapter 'retrieval' gives the vectors of the bare backbone"),
        ("no list", "its /v1/models is not a list of models"),
        ("endless", "not a list of models"),
        ("nan", "values that are not finite"),
        ("zeros", "it sent a vector of zeros"),
        ("huge", "too large to normalise"),
        ("equal", "it sent equal vectors for different texts"),
        ("wrong count", "bytes or more for 2 vectors of 256 values"),
        ("wrong dimension", "bytes or more for 2 vectors of 256 values"),
    ],
)
@PROTOCOLS
async def test_a_wrong_server_is_rejected(
    default_checkpoint: Checkpoint, tmp_path: Path, behaviour: str, words: str, protocol: str
) -> None:
    """A wrong server does not get calls, and the reason names the server and the error."""
    peer = Peer(default_checkpoint, behaviour=behaviour, protocol=protocol)
    async with (
        listening(peer),
        pool(default_checkpoint, tmp_path, peer, wait_for=0) as (engine, metrics),
    ):
        await until(lambda: checked(engine))
        health = engine.health()
        assert health.state is EngineState.STARTING
        assert words in health.reason
        assert peer.url in health.reason
        with pytest.raises(UnavailableError, match="cannot embed now"):
            await engine.embed(batch(1))
        assert serving(metrics) == 0
    assert peer.calls == []


@pytest.mark.anyio
@pytest.mark.parametrize(
    "listing",
    [
        [],
        {},
        {"data": 5},
        {"data": ["a"]},
        {"data": [{"name": "a"}]},
        {"data": []},
        {"data": [{"id": "a", "owned_by": "somebody"}]},
        {"data": [{"id": "a", "tasks": 5}]},
        {"data": [{"id": "a", "tasks": None}]},
        {"data": [{"id": "a", "tasks": [1, [2]]}]},
        {"data": [{"id": "a", "owned_by": "vllm", "parent": "b"}]},
    ],
)
async def test_an_unexpected_listing_is_rejected_and_checked_again(
    default_checkpoint: Checkpoint, tmp_path: Path, listing: Any
) -> None:
    """A server with an unexpected /v1/models is rejected until the response is right."""
    peer = Peer(default_checkpoint)
    peer.listing = listing
    async with (
        listening(peer),
        pool(default_checkpoint, tmp_path, peer, wait_for=0) as (engine, metrics),
    ):
        await until(lambda: checked(engine))
        assert f"{peer.url}: it" in engine.health().reason
        peer.listing = None
        await until(lambda: serving(metrics) == 1)


@pytest.mark.anyio
@pytest.mark.parametrize("behaviour", OUTCOMES)
@PROTOCOLS
async def test_the_only_server_starts_to_misbehave(
    default_checkpoint: Checkpoint, tmp_path: Path, behaviour: str, protocol: str
) -> None:
    """Requests fail with 503 (429 if it is busy), never with wrong vectors; calls are counted."""
    peer = Peer(default_checkpoint, protocol=protocol)
    async with (
        listening(peer),
        pool(default_checkpoint, tmp_path, peer, call_seconds=1.5) as (engine, metrics),
    ):
        before = ended(metrics, OUTCOMES[behaviour])
        peer.behaviour = behaviour
        for _ in range(3):
            with pytest.raises(QueueFullError if behaviour == "429" else UnavailableError):
                await engine.embed(batch(3))
        assert ended(metrics, OUTCOMES[behaviour], peer) > before
        assert serving(metrics) == (behaviour == "429")
        assert engine.health().ready == (behaviour == "429")
        peer.behaviour = "honest"
        await until(lambda: serving(metrics) == 1)
        assert np.array_equal((await engine.embed(batch(3))).vectors, truth(batch(3), 256))


@pytest.mark.anyio
@pytest.mark.parametrize("behaviour", [*OUTCOMES, "slow"])
@PROTOCOLS
async def test_one_of_two_servers_starts_to_misbehave(
    default_checkpoint: Checkpoint, tmp_path: Path, behaviour: str, protocol: str
) -> None:
    """The other server answers every request correctly."""
    good, bad = peers = [Peer(default_checkpoint, protocol=protocol) for _ in range(2)]
    async with (
        listening(*peers),
        pool(default_checkpoint, tmp_path, *peers, call_seconds=1.5) as (engine, metrics),
    ):
        bad.behaviour = behaviour
        asked = [batch(1 + i % 12, start=i + 1) for i in range(24)]
        answers = await asyncio.gather(*map(engine.embed, asked))
        for ask, answer in zip(asked, answers, strict=True):
            assert np.array_equal(answer.vectors, truth(ask, 256))
        assert good.calls
        assert ended(metrics, OUTCOMES.get(behaviour, "ok"), bad)


@pytest.mark.anyio
async def test_one_vector_for_all_texts(default_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A server that gives one vector for every text is wrong, also where each call has one text."""
    peer = Peer(default_checkpoint)
    async with listening(peer), pool(default_checkpoint, tmp_path, peer) as (engine, metrics):
        peer.behaviour = "constant"
        await engine.embed(batch(1, start=1))
        with pytest.raises(UnavailableError):
            await engine.embed(batch(1, start=2))
        assert ended(metrics, "wrong", peer) == 1, "the check that the call caused"
        assert serving(metrics) == 0


@pytest.mark.anyio
async def test_tokens_with_equal_rows(default_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Texts that have equal vectors by the checkpoint cost a check and do not drop the server."""
    peer = Peer(default_checkpoint)
    async with listening(peer), pool(default_checkpoint, tmp_path, peer) as (engine, metrics):
        peer.behaviour = "twins"
        before = peer.posts
        vectors = (await engine.embed(batch(2))).vectors
        assert np.array_equal(vectors[0], vectors[1])
        assert peer.posts == before + 2
        assert serving(metrics) == 1


def poison(adapter: str = "retrieval", *, before: int = 0) -> TokenBatch:
    """Return a batch whose last text has no usable vector."""
    return TokenBatch([*batch(before).ids, np.array([1, POISON, 2], np.int32)], adapter)


@pytest.mark.anyio
async def test_a_text_without_a_usable_vector(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """A text whose vector is not finite costs a check and does not drop the only server."""
    peer = Peer(default_checkpoint, behaviour="nan text")
    async with listening(peer), pool(default_checkpoint, tmp_path, peer) as (engine, metrics):
        before = peer.posts
        assert not np.isfinite((await engine.embed(poison())).vectors).all()
        assert peer.posts == before + 2
        assert serving(metrics) == 1
        assert ended(metrics, "wrong", peer) == 0
        assert np.array_equal((await engine.embed(batch(3))).vectors, truth(batch(3), 256))


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("behaviour", "code"), [("nan text", "vector_not_finite"), ("large text", "out_of_memory")]
)
async def test_a_text_that_a_taskvec_server_refuses(
    default_checkpoint: Checkpoint, tmp_path: Path, behaviour: str, code: str
) -> None:
    """The error has the server's code and names the client's text; no server is tried or blamed."""
    peers = [Peer(default_checkpoint, protocol="taskvec", behaviour=behaviour) for _ in range(2)]
    async with listening(*peers), pool(default_checkpoint, tmp_path, *peers) as (engine, metrics):
        for i in range(1, 2 * MAX_ERRORS + 2):
            with pytest.raises(TaskvecError) as raised:
                await engine.embed(poison(before=60 + i))  # the last ones in the second call
            error = raised.value
            where = f"input[{60 + i}]"
            assert (error.status, error.code, error.param) == (500, code, where)
            assert error.message == f"Not {where}: sorry."
        assert (ended(metrics, "text_error"), ended(metrics, "error"), retried(metrics)) == (
            i,
            0,
            0,
        )
        assert serving(metrics) == 2
        assert np.array_equal((await engine.embed(batch(3))).vectors, truth(batch(3), 256))


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("behaviour", "adapters"),
    [
        ("swapped nan text", ["text-matching", "retrieval"]),
        ("merged", ["retrieval", "clustering"]),
    ],
)
async def test_each_adapter_of_a_suspicious_call_is_checked(
    default_checkpoint: Checkpoint, tmp_path: Path, behaviour: str, adapters: list[str]
) -> None:
    """A server that uses one adapter for another is found, whichever text of a call is odd."""
    peer = Peer(default_checkpoint, protocol="taskvec")
    asked = [poison(adapter) for adapter in adapters]
    if behaviour != "merged":
        asked[1] = batch(1, adapters[1])
    async with listening(peer), pool(default_checkpoint, tmp_path, peer) as (engine, metrics):
        peer.behaviour = behaviour
        results = await joined(engine, peer, *asked)
        assert [type(result) for result in results] == [UnavailableError, UnavailableError]
        assert (ended(metrics, "wrong", peer), serving(metrics)) == (1, 0)


@pytest.mark.anyio
async def test_the_adapter_of_an_earlier_text_is_checked(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """A vector that equals an earlier call's reveals that that one had the wrong adapter."""
    peer = Peer(default_checkpoint)
    async with listening(peer), pool(default_checkpoint, tmp_path, peer) as (engine, metrics):
        peer.behaviour = "merged"
        await engine.embed(batch(1, "clustering"))
        with pytest.raises(UnavailableError):
            await engine.embed(batch(1, "retrieval"))
        assert (ended(metrics, "wrong", peer), serving(metrics)) == (1, 0)


def test_vectors_that_are_not_finite_are_not_equal() -> None:
    """Two texts with the same infinite values do not count as a repetition."""
    vectors = np.array([[np.inf, 1], [np.inf, 1], [1, 2]], np.float32)
    adapters = ["retrieval"] * 3
    assert DistinctVectors().repeats(batch(3).ids, adapters, vectors) == []
    vectors[:2, 0] = 3
    assert DistinctVectors().repeats(batch(3).ids, adapters, vectors) == adapters[:2]


@pytest.mark.anyio
async def test_a_failed_check_of_an_answer_counts_once(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Two checks that fail with an error are two errors, which do not drop the server."""
    peer = Peer(default_checkpoint, behaviour="nan text")
    async with listening(peer), pool(default_checkpoint, tmp_path, peer) as (engine, metrics):
        peer.probe_statuses = [500] * (MAX_ERRORS - 1)
        assert not np.isfinite((await engine.embed(poison())).vectors).all()
        assert ended(metrics, "error", peer) == retried(metrics) == MAX_ERRORS - 1
        assert ended(metrics, "abandoned", peer) == MAX_ERRORS - 1
        assert serving(metrics) == 1


@pytest.mark.anyio
async def test_a_busy_server_is_checked_later(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """An answer whose check meets a full queue waits for the check, and the call is not busy."""
    peer = Peer(default_checkpoint, behaviour="nan text")
    async with listening(peer), pool(default_checkpoint, tmp_path, peer) as (engine, metrics):
        peer.probe_statuses = [429, 429]
        assert not np.isfinite((await engine.embed(poison())).vectors).all()
        assert (ended(metrics, "busy", peer), retried(metrics), len(peer.calls)) == (2, 0, 1)
        assert serving(metrics) == 1


@pytest.mark.anyio
async def test_the_check_of_an_answer_has_the_time_of_its_call(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """The check does not get more time than the request has left."""
    peer = Peer(default_checkpoint, protocol="taskvec", behaviour="nan text")
    async with listening(peer), pool(default_checkpoint, tmp_path, peer) as (engine, _):
        received = len(peer.deadlines)
        asked = TokenBatch(poison().ids, "retrieval", deadline=time.monotonic() + 3)
        with pytest.raises(TaskvecError):
            await engine.embed(asked)
        call, check = peer.deadlines[received:]
        assert 0 < check <= call <= 3000


@pytest.mark.anyio
async def test_an_answer_that_is_being_checked_when_another_is_wrong(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """It is not used, although its own check succeeds."""
    peer = Peer(default_checkpoint, behaviour="nan text")
    async with listening(peer), pool(default_checkpoint, tmp_path, peer) as (engine, metrics):
        peer.probes_released.clear()
        posts = peer.posts
        checked = asyncio.create_task(engine.embed(poison()))
        await until(lambda: peer.posts == posts + 2)
        peer.behaviour = "wrong count"
        with pytest.raises(UnavailableError):
            await engine.embed(batch(1))
        peer.behaviour = "honest"
        peer.probes_released.set()
        with suppress(UnavailableError):  # unless the server passed its checks before the retry
            assert np.isfinite((await checked).vectors).all()
        assert ended(metrics, "abandoned", peer) == 1


@pytest.mark.anyio
async def test_the_same_text_twice(default_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Equal vectors of equal texts are right, in one call and in two."""
    peer = Peer(default_checkpoint)
    ids = batch(1).ids[0]
    async with listening(peer), pool(default_checkpoint, tmp_path, peer) as (engine, _):
        for _ in range(2):
            vectors = (await engine.embed(TokenBatch([ids, ids], "retrieval"))).vectors
            assert np.array_equal(vectors[0], vectors[1])


@pytest.fixture
def quick_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers are found frozen after a second instead of seven."""
    monkeypatch.setattr("taskvec.engines.remote.pool_server.HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setattr("taskvec.engines.remote.pool_server.HEARTBEAT_TIMEOUT_SECONDS", 0.5)


@pytest.mark.anyio
@pytest.mark.usefixtures("quick_heartbeat")
@PROTOCOLS
async def test_a_frozen_server_holds_no_calls(
    default_checkpoint: Checkpoint, tmp_path: Path, protocol: str
) -> None:
    """Calls to a server that answers nothing at all move to another long before their timeout."""
    good, frozen = peers = [Peer(default_checkpoint, protocol=protocol) for _ in range(2)]
    async with (
        listening(*peers),
        pool(default_checkpoint, tmp_path, *peers, call_seconds=60.0) as (engine, metrics),
    ):
        frozen.behaviour = "silent"
        begun = time.monotonic()
        asked = [batch(1 + i % 12, start=i + 1) for i in range(24)]
        answers = await asyncio.gather(*map(engine.embed, asked))
        assert time.monotonic() - begun < 10
        for ask, answer in zip(asked, answers, strict=True):
            assert np.array_equal(answer.vectors, truth(ask, 256))
        assert frozen.closed
        assert good.calls
        assert serving(metrics) == 1


@pytest.mark.anyio
@pytest.mark.usefixtures("quick_heartbeat")
async def test_a_long_computation_is_not_frozen(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """A server that computes for long, and still lists its models, keeps its calls."""
    peer = Peer(default_checkpoint)
    async with listening(peer), pool(default_checkpoint, tmp_path, peer) as (engine, metrics):
        peer.released.clear()
        waiting = asyncio.create_task(engine.embed(batch(3)))
        await asyncio.sleep(2)
        assert not waiting.done()
        peer.released.set()
        assert np.array_equal((await waiting).vectors, truth(batch(3), 256))
        assert (serving(metrics), len(peer.calls)) == (1, 1)


@pytest.mark.anyio
async def test_a_lack_of_open_files_drops_nobody(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Without files for connections, calls wait for one; no server is dropped, no call is lost."""
    peer = Peer(default_checkpoint)
    async with listening(peer), pool(default_checkpoint, tmp_path, peer) as (engine, metrics):
        asked = [batch(9, start=i + 1) for i in range(40)]
        with no_open_files() as release:
            waiting = [asyncio.create_task(engine.embed(each)) for each in asked]
            await asyncio.sleep(0.5)
            assert not all(task.done() for task in waiting)
            release()
            answers = await asyncio.gather(*waiting)
        for ask, answer in zip(asked, answers, strict=True):
            assert np.array_equal(answer.vectors, truth(ask, 256))
        assert (serving(metrics), ended(metrics, "unreachable"), ended(metrics, "timeout")) == (
            1,
            0,
            0,
        )


@pytest.mark.anyio
async def test_more_calls_than_connections(default_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Calls beyond the connections of this process wait, and that is no failure of the server."""
    peer = Peer(default_checkpoint)
    async with (
        listening(peer),
        pool(default_checkpoint, tmp_path, peer, connections=2) as (engine, metrics),
    ):
        peer.behaviour = "slow"
        asked = [batch(9, start=i + 1) for i in range(12)]
        answers = await asyncio.gather(*map(engine.embed, asked))
        for ask, answer in zip(asked, answers, strict=True):
            assert np.array_equal(answer.vectors, truth(ask, 256))
        assert serving(metrics) == 1


@pytest.mark.anyio
@pytest.mark.parametrize("behaviour", ["silent", "endless", "slow", "500"])
async def test_a_deadline_is_met_with_a_misbehaving_server(
    default_checkpoint: Checkpoint, tmp_path: Path, behaviour: str
) -> None:
    """With any behaviour of the server, a request with a deadline of 0.1 s ends soon after."""
    peer = Peer(default_checkpoint)
    async with listening(peer), pool(default_checkpoint, tmp_path, peer) as (engine, _):
        peer.behaviour = behaviour
        begun = time.monotonic()
        asked = TokenBatch(batch(3).ids, "retrieval", deadline=begun + 0.1)
        with pytest.raises((UnavailableError, DeadlineExceededError)):
            await engine.embed(asked)
        assert time.monotonic() - begun < 3


@pytest.mark.anyio
@pytest.mark.parametrize("status", [302, 307])
async def test_a_redirect_is_not_followed(
    default_checkpoint: Checkpoint, tmp_path: Path, status: int
) -> None:
    """Texts are not sent to another server by a redirect."""
    elsewhere = Peer(default_checkpoint)
    peer = Peer(default_checkpoint)

    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=status, headers={"location": elsewhere.url + request.path})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    async with (
        listening(peer, elsewhere),
        pool(default_checkpoint, tmp_path, peer) as (engine, _),
    ):
        await peer.stop()
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", peer.port).start()
        try:
            for start in (1, 2):
                with pytest.raises(UnavailableError):
                    await engine.embed(batch(1, start=start))
        finally:
            await runner.cleanup()
    assert elsewhere.posts == 0
    assert elsewhere.keys == []


@pytest.mark.anyio
async def test_a_port_without_a_server(default_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Without a server on the port, the engine is starting, and the reason names the URL."""
    url = f"http://127.0.0.1:{free_port()}"
    async with pool(default_checkpoint, tmp_path, wait_for=0, urls=(url,)) as (engine, _):
        await until(lambda: "Connect" in engine.health().reason)
        assert f"{url}: " in engine.health().reason
        assert engine.health().state is EngineState.STARTING


@pytest.mark.anyio
@PROTOCOLS
async def test_a_hung_server_is_detected_by_one_call(
    default_checkpoint: Checkpoint, tmp_path: Path, protocol: str
) -> None:
    """A call without a deadline that times out opens the circuit at once."""
    peer = Peer(default_checkpoint, protocol=protocol)
    async with (
        listening(peer),
        pool(default_checkpoint, tmp_path, peer, call_seconds=1.5, check_seconds=600) as (
            engine,
            metrics,
        ),
    ):
        peer.behaviour = "silent"
        with pytest.raises(UnavailableError):
            await engine.embed(batch(1))
        assert ended(metrics, "timeout") == 1
        assert serving(metrics) == 0


@pytest.mark.anyio
async def test_an_idle_server_is_probed(default_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Adapters that are swapped later are detected without any request."""
    peer = Peer(default_checkpoint)
    async with (
        listening(peer),
        pool(default_checkpoint, tmp_path, peer, check_seconds=0.05) as (
            engine,
            metrics,
        ),
    ):
        posts = peer.posts
        await until(lambda: peer.posts >= posts + 5)
        assert serving(metrics) == 1
        peer.behaviour = "swapped"
        await until(lambda: serving(metrics) == 0)
        await until(lambda: "gives the vectors of adapter" in engine.health().reason)
    assert peer.calls == []


@pytest.mark.anyio
async def test_a_busy_server_is_not_probed_repeatedly(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """A probe that is answered with 429 is not repeated at once."""
    peer = Peer(default_checkpoint)
    async with (
        listening(peer),
        pool(default_checkpoint, tmp_path, peer, check_seconds=0.2) as (
            _,
            metrics,
        ),
    ):
        peer.behaviour = "429"
        await until(lambda: ended(metrics, "busy"))
        posts = peer.posts
        await asyncio.sleep(1)
        assert peer.posts - posts <= 10
        assert serving(metrics) == 1
