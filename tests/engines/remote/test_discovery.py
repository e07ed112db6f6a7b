"""Engine URLs, and discovery of servers by DNS."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import trustme

from engines.remote.peer import Peer, batch, listening, pool, samples, truth, until
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.engines.base import EngineState
from taskvec.engines.remote.discovery import check_url, expand, resolve_host
from taskvec.errors import StartError


async def resolve(host: str) -> Sequence[str]:
    """Resolve fixed names."""
    if host == "gone":
        raise OSError("no such name")
    return {"pods": ["10.0.0.1", "10.0.0.2"], "six": ["fd00::1", "fe80::2%eth0"]}[host]


@pytest.mark.parametrize(
    "url",
    [
        "http://engine:8000",
        "https://engine.example",
        "http://[::1]:8000",
        "https://engine/behind/a/path",
        "unix:///run/engine.sock",
        "dns://engine-headless:8000",
        "dns://engine.ns.svc.cluster.local:80",
    ],
)
def test_a_trailing_slash_is_removed(url: str) -> None:
    """Every documented form is accepted, and a trailing slash is removed."""
    assert check_url(url) == url
    assert check_url(url + "/") == url


@pytest.mark.parametrize(
    "url",
    [
        "",
        "/",
        "engine:8000",
        "http://",
        "ftp://engine:8000",
        "http:engine:8000",
        "http://engine: 8000",
        "dns://engine",
        "dns://engine:",
        "dns://engine:port",
        "dns://engine:8000/path",
        "dns://:8000",
        "unix://engine.sock",
    ],
)
def test_an_invalid_url_is_rejected(url: str) -> None:
    """An invalid URL is rejected with the valid forms."""
    with pytest.raises(ValueError, match=r"write http://host:port, .*dns://name:port"):
        check_url(url)


@pytest.mark.parametrize("url", ["dns://engine:0", "dns://engine:65536", "dns://engine:99999"])
def test_an_invalid_port_is_rejected(url: str) -> None:
    """An impossible port is rejected when the URL is checked."""
    with pytest.raises(ValueError, match="not an engine URL"):
        check_url(url)


@pytest.mark.anyio
async def test_a_name_becomes_a_server_for_each_address() -> None:
    """A name is replaced by one HTTP URL per address, with IPv6 in brackets."""
    servers, failures = await expand(["https://a", "dns://pods:81", "dns://six:82"], resolve)
    assert servers == [
        "https://a",
        "http://10.0.0.1:81",
        "http://10.0.0.2:81",
        "http://[fd00::1]:82",
        "http://[fe80::2%eth0]:82",
    ]
    assert failures == []


@pytest.mark.anyio
async def test_a_server_is_listed_once() -> None:
    """A server that is listed twice, or by name and by address, appears once."""
    urls = ["http://10.0.0.2:81", "dns://pods:81", "dns://pods:81", "http://10.0.0.2:81"]
    servers, _ = await expand(urls, resolve)
    assert servers == ["http://10.0.0.2:81", "http://10.0.0.1:81"]


@pytest.mark.anyio
async def test_a_failed_lookup_does_not_affect_other_names() -> None:
    """A failed lookup is reported with the name and the reason, and others succeed."""
    servers, failures = await expand(["dns://gone:1", "dns://pods:81"], resolve)
    assert servers == ["http://10.0.0.1:81", "http://10.0.0.2:81"]
    assert failures == ["dns://gone:1 could not be resolved (no such name)"]


@pytest.mark.anyio
async def test_the_resolver_of_the_system() -> None:
    """A real lookup returns each address once."""
    found = await resolve_host("localhost")
    assert set(found) <= {"127.0.0.1", "::1"}
    assert len(found) == len(set(found)) > 0


@pytest.mark.anyio
@pytest.mark.parametrize("host", ["nowhere.invalid", "a..b", "x" * 64])
async def test_a_name_that_cannot_exist_is_a_failed_lookup(host: str) -> None:
    """An unknown or invalid name is reported, and other servers are returned."""
    servers, failures = await expand([f"dns://{host}:80", "http://a"], resolve_host)
    assert servers == ["http://a"]
    assert len(failures) == 1
    assert host in failures[0]


@pytest.mark.anyio
async def test_names_are_looked_up_again(default_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Servers join and leave with the lookups; a failed lookup is counted and keeps all servers."""
    first = Peer(default_checkpoint)
    found: list[Sequence[str] | OSError] = [OSError("no such name")]

    async def resolve(host: str) -> Sequence[str]:
        assert host == "pods"
        if isinstance(found[-1], OSError):
            raise found[-1]
        return found[-1]

    options = {"urls": (f"dns://pods:{first.port}",), "lookup_seconds": 0.05}
    async with (
        listening(first),
        pool(default_checkpoint, tmp_path, wait_for=0, resolve=resolve, **options) as (
            engine,
            metrics,
        ),
    ):

        def states() -> dict[str, float]:
            series = samples(metrics.registry, "taskvec_engine_server_serving")
            return {labels[0].split("/")[2].split(":")[0]: v for labels, v in series.items()}

        await until(lambda: "could not be resolved (no such name)" in engine.health().reason)
        found.append(["127.0.0.1"])
        await until(lambda: states() == {"127.0.0.1": 1})
        found.append(["127.0.0.1", "127.0.0.2"])  # the second does not listen
        await until(lambda: states() == {"127.0.0.1": 1, "127.0.0.2": 0})
        counter = "taskvec_engine_lookup_failures_total"
        before = samples(metrics.registry, counter)[()]
        found.append(OSError("the resolver is down"))
        await until(lambda: samples(metrics.registry, counter)[()] >= before + 2)
        assert states() == {"127.0.0.1": 1, "127.0.0.2": 0}
        assert len((await engine.embed(batch(2))).vectors) == 2
        first.released.clear()
        request = asyncio.create_task(engine.embed(batch(3)))
        await until(lambda: len(first.calls) == 2)
        found.append(["127.0.0.2"])
        await until(lambda: states() == {"127.0.0.2": 0})
        assert engine.health().state is EngineState.UNAVAILABLE
        first.released.set()
        assert len((await request).vectors) == 3  # a call in progress continues
        assert states() == {"127.0.0.2": 0}
        assert not any(
            first.url in labels
            for labels in samples(metrics.registry, "taskvec_engine_calls_total")
        )


@pytest.mark.anyio
async def test_a_unix_socket(default_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A server on a Unix socket works, and its name does not contain the folder."""
    peer = Peer(default_checkpoint, protocol="taskvec")
    async with (
        listening(peer, socket=tmp_path / "engine.sock"),
        pool(default_checkpoint, tmp_path, peer) as (engine, metrics),
    ):
        assert np.array_equal((await engine.embed(batch(3))).vectors, truth(batch(3), 256))
        series = samples(metrics.registry, "taskvec_engine_server_serving")
        assert series == {("unix:engine.sock",): 1.0}


@pytest.mark.anyio
async def test_https(default_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Only a server with a certificate of the given CA is used."""
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    authority = trustme.CA()
    authority.cert_pem.write_to_path(certificate)
    own = authority.issue_cert("127.0.0.1")
    own.private_key_pem.write_to_path(key)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    own.configure_cert(tls)
    peer = Peer(default_checkpoint)
    async with listening(peer, tls=tls):
        async with pool(default_checkpoint, tmp_path, peer, ca=certificate) as (engine, _):
            assert np.array_equal((await engine.embed(batch(3))).vectors, truth(batch(3), 256))
        async with pool(default_checkpoint, tmp_path, peer, wait_for=0) as (engine, _):
            await until(lambda: "ertificate" in engine.health().reason)
        with pytest.raises(StartError, match=r"key\.pem cannot be read as certificates"):
            async with pool(default_checkpoint, tmp_path, peer, ca=key):
                pass
