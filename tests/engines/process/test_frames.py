"""Frames between a gateway and the engine process: what goes in comes out, however it is cut."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskvec.engines.base import EngineResult, TokenBatch
from taskvec.engines.process import frames as frames_module
from taskvec.engines.process.frames import (
    FrameProtocol,
    Kind,
    pack_call,
    pack_error,
    pack_frame,
    pack_result,
    unpack_call,
    unpack_error,
    unpack_result,
)
from taskvec.errors import ALL_ERRORS, PayloadTooLargeError, QueueFullError, TaskvecError
from taskvec.priority import Priority

ADAPTERS = (None, "retrieval", "clustering")
TEXTS = st.lists(
    st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20), min_size=1, max_size=20
)


class Frames(FrameProtocol):
    """Keeps the frames that it received."""

    def __init__(self) -> None:
        super().__init__()
        self.received: list[tuple[int, bytes]] = []

    def frame_received(self, kind: int, call: int, body: bytes | memoryview) -> None:
        assert call == 0
        self.received.append((kind, bytes(body)))


@given(st.lists(st.binary(max_size=200), max_size=8), st.lists(st.integers(1, 60), min_size=1))
def test_frames_survive_every_cut(bodies: list[bytes], cuts: list[int]) -> None:
    """A stream gives the same frames, wherever the system cuts it into chunks."""
    stream = b"".join(pack_frame(Kind.STATUS, body) for body in bodies)
    frames = Frames()
    position = number = 0
    while position < len(stream):
        size = cuts[number % len(cuts)]
        frames.data_received(stream[position : position + size])
        position += size
        number += 1
    assert frames.received == [(Kind.STATUS, body) for body in bodies]


def test_a_frame_that_is_too_large_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller of a frame that the other side would refuse gets an error; others go on."""
    monkeypatch.setattr(frames_module, "MAX_BODY", 100)

    async def send() -> bytes:
        own, theirs = socket.socketpair()
        loop = asyncio.get_running_loop()
        _, frames = await loop.create_unix_connection(Frames, sock=own)
        with pytest.raises(PayloadTooLargeError, match="101 bytes"):
            frames.send(Kind.RESULT, 1, b"x" * 50, b"x" * 51)
        frames.send(Kind.RESULT, 1, b"x" * 100)
        with theirs:
            theirs.setblocking(False)
            received = await loop.sock_recv(theirs, 1000)
        cast("asyncio.Transport", frames.transport).close()
        return received

    assert len(asyncio.run(send())) == len(pack_frame(Kind.RESULT, b"x" * 100))


def test_a_frame_that_memory_runs_out_for_is_lost_alone() -> None:
    """The call whose frame cannot be put together is named, and the next frame arrives."""
    done = subprocess.run(
        [sys.executable, "-c", SCARCE], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.split() == ["lost", "1", "7", "received", "2", "8"], done.stderr


SCARCE = """
import resource, struct
from taskvec.engines.process.frames import FrameProtocol

class Frames(FrameProtocol):
    def frame_received(self, kind, call, body):
        print("received", kind, call)

    def frame_lost(self, kind, call):
        print("lost", kind, call)

head = struct.Struct("=IB3xI")
stream = head.pack(256 << 20, 1, 7) + bytes(256 << 20) + head.pack(0, 2, 8)
frames, chunk = Frames(), (16 << 20) - 5
starts = range(0, len(stream), chunk)
chunks = [stream[start : start + chunk] for start in starts]
del stream
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (64 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for each in chunks:
    frames.data_received(each)
"""


@given(
    texts=TEXTS,
    adapter=st.sampled_from(ADAPTERS),
    deadline=st.none() | st.floats(0, 1e9),
    priority=st.sampled_from(Priority),
)
def test_a_call_survives(
    texts: list[list[int]], adapter: str | None, deadline: float | None, priority: Priority
) -> None:
    """Ids, adapter, deadline and class of a call arrive as they were sent."""
    sent = TokenBatch([np.array(text, np.int32) for text in texts], adapter, deadline, priority)
    body = b"".join(pack_call(sent, ADAPTERS))
    entered: list[str] = []
    got = unpack_call(body, ADAPTERS, lambda: entered.append("entered"))
    assert [ids.tolist() for ids in got.ids] == texts
    assert (got.adapter, got.deadline, got.priority) == (adapter, deadline, priority)
    got.entered()
    assert entered == ["entered"]


@given(rows=st.integers(1, 40), dimension=st.integers(1, 40), finished=st.integers(0, 2**60))
def test_a_result_survives(rows: int, dimension: int, finished: int) -> None:
    """Vectors arrive bit for bit, also those of a matrix that is not contiguous."""
    random = np.random.default_rng(rows)
    vectors = random.standard_normal((dimension, rows)).astype(np.float32).T
    body = b"".join(pack_result(EngineResult(vectors, 0.25, 1.5, 1.25, 0.75), finished))
    result, counter = unpack_result(body, dimension)
    assert np.array_equal(result.vectors, vectors)
    assert (result.queued, result.computed) == (0.25, 1.5)
    assert (result.forward, result.processor) == (1.25, 0.75)
    assert counter == finished


@pytest.mark.parametrize("kind", ALL_ERRORS)
def test_an_error_keeps_its_class(kind: type[TaskvecError]) -> None:
    """What the engine raises is what the gateway raises, with all that a client sees of it."""
    error = kind("input[3] is bad.", code="a_code", param="input[3]", retry_after=2.5)
    got = unpack_error(pack_error(error))
    assert type(got) is kind
    assert (got.message, got.code, got.param) == ("input[3] is bad.", "a_code", "input[3]")
    assert got.retry_after == 2.5


def test_an_unknown_error_is_an_internal_one() -> None:
    """An error class of another version is reported as an internal error."""
    body = pack_error(QueueFullError("full")).replace(b"QueueFullError", b"NewKindOfError")
    assert type(unpack_error(body)) is TaskvecError
