"""Addresses on which the server listens, proxies that it trusts, and its idle connections."""

from __future__ import annotations

import socket
import time
from contextlib import closing

import httpx
import pytest
from starlette.types import Scope
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from conftest import free_port, wait_until
from processes import EXACT, Served, connects, ended, started
from sockets import answer, hung_up, served
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.errors import StartError
from taskvec.server.listen import bind, trusted_proxies
from taskvec.settings import Settings

LIVE = b"GET /health/live HTTP/1.1\r\nHost: test\r\n\r\n"
LOOPBACK = ("127.0.0.1", "::1")


def accepts(host: str, port: int) -> bool:
    """Return whether a client can connect to the address."""
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("host", "reached"),
    [
        ("::", {"127.0.0.1", "::1"}),
        ("::1", {"::1"}),
        ("127.0.0.1", {"127.0.0.1"}),
        ("0.0.0.0", {"127.0.0.1"}),  # noqa: S104 - on a free port, for a moment
    ],
)
def test_the_addresses_of_a_host(host: str, reached: set[str]) -> None:
    """``::`` is every address of both families; every other one is what it says."""
    sockets = bind(host, 0)
    for each in sockets:
        each.listen()
    port = sockets[0].getsockname()[1]
    assert {address for address in LOOPBACK if accepts(address, port)} == reached
    for each in sockets:
        each.close()


def test_a_name_with_several_addresses_has_one_port() -> None:
    """Each address of a name gets a socket, all of them the port that was free for the first."""
    sockets = bind("localhost", 0)
    assert len({each.getsockname()[1] for each in sockets}) == 1
    for each in sockets:
        each.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "::", "localhost"])
def test_a_taken_port_is_named(host: str) -> None:
    """The error names host and port, and says that it is in use."""
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        port = other.getsockname()[1]
        with pytest.raises(StartError, match=rf"{port} cannot be bound.*another server"):
            bind(host, port)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.7"])
def test_a_host_that_is_not_here_is_named(host: str) -> None:
    """A name without an address, and an address of another machine, are one sentence."""
    with pytest.raises(StartError, match=rf"^{host}:80 cannot be bound"):
        bind(host, 80)


@pytest.mark.parametrize("options", [["--in-process"], ["--workers", "2"]], ids=str)
def test_a_server_on_all_addresses(options: list[str]) -> None:
    """With ``--host [::]`` a real server answers on 127.0.0.1 and on ::1."""
    with started("--host", "[::]", *options, *EXACT) as server:
        wait_until(f"{server.url}/health/ready", server.process)
        for host in ("127.0.0.1", "[::1]"):
            reply = httpx.get(f"http://{host}:{server.port}/health/ready", timeout=20)
            assert reply.status_code == 200


@pytest.mark.parametrize("options", [["--in-process"], []], ids=str)
def test_a_server_whose_port_is_taken(options: list[str]) -> None:
    """It ends with exit code 3 and one sentence."""
    port = free_port()
    with closing(socket.create_server(("127.0.0.1", port))):
        code, errors = ended(Served(*options, *EXACT, port=port))
    assert code == 3
    assert f"127.0.0.1:{port} cannot be bound" in errors
    assert "Traceback" not in errors
    assert not connects(port)


async def forwarded(configured: tuple[str, ...], client: str) -> tuple[str, str]:
    """Return the client's address and the scheme that the application sees behind a proxy."""
    seen: list[Scope] = []

    async def app(scope: Scope, *_: object) -> None:
        seen.append(scope)

    async def nothing(*_: object) -> dict[str, object]:
        return {}

    headers = [(b"x-forwarded-for", b"203.0.113.7"), (b"x-forwarded-proto", b"https")]
    scope = {"type": "http", "client": (client, 1), "scheme": "http", "headers": headers}
    wrapped = ProxyHeadersMiddleware(app, trusted_hosts=trusted_proxies(configured))  # type: ignore[arg-type]
    await wrapped(scope, nothing, nothing)  # type: ignore[arg-type]
    return seen[0]["client"][0], seen[0]["scheme"]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("configured", "variable", "client", "believed"),
    [
        ("", "", "127.0.0.1", True),
        ("", "", "::1", True),
        ("", "", "::ffff:127.0.0.1", True),
        ("", "", "10.1.2.3", False),
        ("", "10.1.2.3", "10.1.2.3", True),
        ("", "10.1.2.3", "127.0.0.1", False),
        ("10.0.0.0/8", "192.0.2.1", "10.1.2.3", True),
        ("10.0.0.0/8", "192.0.2.1", "::ffff:10.1.2.3", True),
        ("10.0.0.0/8", "192.0.2.1", "192.0.2.1", False),
        ("10.0.0.0/8", "", "127.0.0.1", False),
        ("fd00::/8, 10.1.2.3", "", "fd00::7", True),
        ("*", "", "198.51.100.1", True),
        ("10.0.0.1, *", "", "198.51.100.1", True),
    ],
)
async def test_whose_forwarded_headers_are_believed(
    monkeypatch: pytest.MonkeyPatch, configured: str, variable: str, client: str, believed: bool
) -> None:
    """Those of the proxies in the setting, else in uvicorn's variable, else of this machine."""
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", variable)
    settings = Settings(forwarded_allow_ips=configured)
    expected = ("203.0.113.7", "https") if believed else (client, "http")
    assert await forwarded(settings.forwarded_allow_ips, client) == expected


@pytest.mark.parametrize("seconds", [0.3, 30.0])
def test_idle_connections_are_kept_as_long_as_configured(
    default_checkpoint: Checkpoint, seconds: float
) -> None:
    """An idle connection is closed after the keep-alive timeout, and not before."""
    with (
        served(default_checkpoint, keep_alive_timeout=seconds) as service,
        service.connect() as connection,
    ):
        connection.sendall(LIVE)
        assert answer(connection)[0].status == 200
        began = time.monotonic()
        if seconds > 1:
            time.sleep(1)
            connection.sendall(LIVE)
            assert answer(connection)[0].status == 200
        else:
            assert hung_up(connection)
            assert time.monotonic() - began >= 0.25
