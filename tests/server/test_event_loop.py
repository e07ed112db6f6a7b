"""Connections that wait are taken, also while every turn of the event loop lasts."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import time
from collections.abc import Callable, Coroutine
from contextlib import ExitStack, closing
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar, cast

import pytest
import uvloop

from taskvec.open_files import MIN_CONNECTING
from taskvec.server.event_loop import BatchAcceptLoop, BatchAcceptServer, accept_loop

T = TypeVar("T")
WAITING = 200
TURN = 0.01
"""Seconds that something else takes in each turn."""


class Greeter(asyncio.Protocol):
    """Says hello, and closes the connection."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast("asyncio.WriteTransport", transport).write(b"hello")
        transport.close()


def run(kind: Callable[[], uvloop.Loop], coroutine: Coroutine[Any, Any, T]) -> T:
    with closing(kind()) as loop:
        return loop.run_until_complete(coroutine)


async def listen() -> tuple[asyncio.AbstractServer, tuple[str, int]]:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Greeter, "127.0.0.1", 0, backlog=2 * WAITING)
    return server, server.sockets[0].getsockname()


async def close(server: asyncio.AbstractServer) -> None:
    """Close a server, and let the connections that it has taken end."""
    server.close()
    if isinstance(server, BatchAcceptServer):
        await server.wait_connected()
    await asyncio.sleep(0.01)


def greeted(connection: socket.socket) -> bool:
    try:
        return connection.recv(5, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b"hello"
    except BlockingIOError:
        return False


async def turns_until_all_are_taken() -> int:
    server, address = await listen()
    turns = 0
    with ExitStack() as open_until_the_end:
        clients = [
            open_until_the_end.enter_context(socket.create_connection(address))
            for _ in range(WAITING)
        ]
        while turns < 2 * WAITING and not all(map(greeted, clients)):
            turns += 1
            time.sleep(TURN)  # noqa: ASYNC251 - what a busy loop does
            await asyncio.sleep(0)
    await close(server)
    return turns


def test_a_busy_loop_takes_all_that_wait() -> None:
    """Two hundred connections are taken in a few turns."""
    assert run(BatchAcceptLoop, turns_until_all_are_taken()) < WAITING / 4


async def taken_after(pause: float, turn: float) -> int:
    """The most connections that a turn takes, after a pause and with turns of a length."""
    server, address = await listen()
    with ExitStack() as open_until_the_end:

        def connect(number: int) -> list[socket.socket]:
            return [
                open_until_the_end.enter_context(socket.create_connection(address))
                for _ in range(number)
            ]

        (first,) = connect(1)
        while not greeted(first):
            await asyncio.sleep(0.01)
        await asyncio.sleep(pause)
        clients, taken = connect(WAITING), [0]
        while taken[-1] < WAITING and len(taken) < 20:
            time.sleep(turn)  # noqa: ASYNC251 - what a busy loop does
            await asyncio.sleep(0)
            taken.append(sum(map(greeted, clients)))
    await close(server)
    return max(after - before for before, after in pairwise(taken))


def test_an_idle_loop_takes_few_of_a_burst() -> None:
    """After a second without work, a burst is not taken at once: other processes have their part.

    The pause of a second does not count as a turn of that length.
    """
    assert run(BatchAcceptLoop, taken_after(pause=1.0, turn=0.0)) < WAITING / 4


@pytest.mark.parametrize("bound", [MIN_CONNECTING, 150])
def test_one_turn_takes_a_bounded_number(bound: int) -> None:
    """However long a turn lasts, the files that are reserved are enough for what it takes."""
    most = run(partial(accept_loop, bound), taken_after(pause=0.0, turn=0.1))
    assert bound / 2 < most <= bound + 2


async def greeted_after_close(number: int) -> int:
    """The number of connections that are greeted if they waited when the server was closed."""
    server, address = await listen()
    with ExitStack() as open_until_the_end:
        clients = [
            open_until_the_end.enter_context(socket.create_connection(address))
            for _ in range(number)
        ]
        await close(server)
        return sum(map(greeted, clients))


def test_what_waits_is_taken_before_the_end() -> None:
    """Connections in the kernel's queue are not reset when the server is closed."""
    assert run(BatchAcceptLoop, greeted_after_close(MIN_CONNECTING)) == MIN_CONNECTING


def test_uvloop_takes_one_a_turn() -> None:
    """Why there is a loop of our own: where this fails, it can go."""
    assert WAITING <= run(uvloop.Loop, turns_until_all_are_taken()) < 2 * WAITING


def test_a_closed_server_refuses() -> None:
    """Nothing listens any more, on either of the two files of the socket."""

    async def close() -> tuple[str, int]:
        server, address = await listen()
        assert server.is_serving()
        server.close()
        await asyncio.sleep(0.01)
        assert not server.is_serving()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
        return address

    run(BatchAcceptLoop, close())


def test_it_goes_on_after_files_have_run_out() -> None:
    """Connections for which there was no file are lost; a later one is greeted."""

    async def run_out() -> bytes:
        server, address = await listen()
        loop = asyncio.get_running_loop()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with ExitStack() as open_until_the_end:
            for _ in range(50):
                open_until_the_end.enter_context(socket.create_connection(address))
            free = os.dup(0)
            os.close(free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
            try:
                for _ in range(10):
                    time.sleep(TURN)  # noqa: ASYNC251 - what a busy loop does
                    await asyncio.sleep(0)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        with closing(socket.create_connection(address, timeout=10)) as late:
            greeting = await loop.run_in_executor(None, late.recv, 5)
        server.close()
        return greeting

    assert run(BatchAcceptLoop, run_out()) == b"hello"
