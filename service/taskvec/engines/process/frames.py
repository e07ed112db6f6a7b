"""Frames between a gateway and the engine process on the same machine, over a Unix socket.

A frame is a head (length of its body, kind, number of the call) and a body. Numbers have the byte
order of the machine. Times are on the clock of ``time.monotonic``, which all processes share.
"""

from __future__ import annotations

import asyncio
import enum
import math
import struct
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, cast

import numpy as np
import orjson
from numpy.typing import NDArray

from taskvec.engines.base import EngineResult, TokenBatch, TokenIds
from taskvec.errors import ALL_ERRORS, PayloadTooLargeError, TaskvecError
from taskvec.priority import Priority

MAX_BODY = 1 << 30
"""Bytes of the largest body; a longer one shows that the two sides have lost step."""

WRITE_JOINED = 1 << 16
"""Frames of up to this many bytes are copied into one piece before they are sent."""

_HEAD = struct.Struct("=IB3xI")
_CALL = struct.Struct("=dhBxI")
_RESULT = struct.Struct("=Qdddd")
_PRIORITIES = tuple(Priority)
_ERRORS = {error.__name__: error for error in ALL_ERRORS}

Body = bytes | memoryview


class Kind(enum.IntEnum):
    """What a frame is; the first three go to the engine process."""

    EMBED = 1
    CANCEL = 2
    STOP = 3
    RESULT = 4
    ERROR = 5
    ENTERED = 6
    STATUS = 7
    EVENTS = 8
    FAILED = 9


class FrameProtocol(asyncio.Protocol):
    """Splits a stream into frames; each is handed to ``frame_received``."""

    def __init__(self) -> None:
        """Start without a connection."""
        self.transport: asyncio.Transport | None = None
        self._chunks: list[bytes] = []
        self._size = 0
        self._needed = 0

    def frame_received(self, kind: int, call: int, body: Body) -> None:
        """Handle one frame.

        Args:
            kind: a value of ``Kind``.
            call: number of the call; 0 if the frame belongs to none.
            body: may be a view of the received bytes.
        """
        raise NotImplementedError

    def frame_lost(self, kind: int, call: int) -> None:
        """Handle a frame that was received, and that there was no memory for."""
        raise NotImplementedError

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast("asyncio.Transport", transport)

    def send(self, kind: Kind, call: int = 0, *parts: Body) -> None:
        """Send a frame; does nothing after the connection has ended.

        Raises:
            PayloadTooLargeError: the other side would refuse it, and end the connection.
        """
        if self.transport is None or self.transport.is_closing():
            return
        length = sum(map(len, parts))
        if length > MAX_BODY:
            raise PayloadTooLargeError(
                f"The texts or vectors of the request take {length} bytes, more than the "
                f"{MAX_BODY} of a frame: send fewer texts."
            )
        try:
            head = _HEAD.pack(length, kind, call)
            if length <= WRITE_JOINED:
                self.transport.write(b"".join((head, *parts)))
            else:
                self.transport.writelines((head, *parts))
        except MemoryError:
            self.transport.abort()  # half of the frame may have been written
            raise

    def data_received(self, data: bytes) -> None:
        """Hand over the frames that are complete, and keep the rest."""
        if self._chunks:
            self._chunks.append(data)
            self._size += len(data)
            if self._size < self._needed:
                return
            try:
                data = b"".join(self._chunks)
            except MemoryError:
                data = self._lose_frame()
            self._chunks.clear()
        start, end = 0, len(data)
        needed = _HEAD.size
        while end - start >= _HEAD.size:
            length, kind, call = _HEAD.unpack_from(data, start)
            if length > MAX_BODY:
                cast("asyncio.Transport", self.transport).abort()
                return
            needed = _HEAD.size + length
            if end - start < needed:
                break
            stop = start + needed
            body: Body = memoryview(data)[start + _HEAD.size : stop]
            # A small frame must not keep a large chunk in memory while it waits.
            self.frame_received(kind, call, body if 2 * needed > end else bytes(body))
            start, needed = stop, _HEAD.size
        if start < end:
            rest = data[start:] if start else data
            self._chunks.append(rest)
            self._size, self._needed = len(rest), needed

    def _lose_frame(self) -> bytes:
        """Give up the frame that has just become complete; return what follows it."""
        if self._needed == _HEAD.size:
            raise MemoryError  # its length is not known yet
        first, last = self._chunks[0], self._chunks[-1]
        rest = last[len(last) - (self._size - self._needed) :]
        _, kind, call = _HEAD.unpack_from(first)
        self._chunks.clear()
        self.frame_lost(kind, call)
        return rest


def pack_frame(kind: Kind, body: bytes) -> bytes:
    """Return a whole frame that belongs to no call."""
    return _HEAD.pack(len(body), kind, 0) + body


def pack_call(batch: TokenBatch, adapters: Sequence[str | None]) -> tuple[bytes, ...]:
    """Return the body of an EMBED frame.

    Args:
        batch: texts to embed.
        adapters: adapters in the order that both sides know.
    """
    texts = len(batch.ids)
    head = _CALL.pack(
        math.inf if batch.deadline is None else batch.deadline,
        adapters.index(batch.adapter),
        _PRIORITIES.index(batch.priority),
        texts,
    )
    if texts == 1:
        (ids,) = batch.ids
        return head, np.int32(len(ids)).tobytes(), ids.tobytes()
    lengths = np.fromiter(map(len, batch.ids), dtype=np.int32, count=texts)
    return head, lengths.tobytes(), np.concatenate(batch.ids, dtype=np.int32).tobytes()


def unpack_call(
    body: Body, adapters: Sequence[str | None], entered: Callable[[], None]
) -> TokenBatch:
    """Return the batch of an EMBED frame; its ids are views of the body.

    Args:
        body: of the frame.
        adapters: adapters in the order that both sides know.
        entered: see ``TokenBatch``.
    """
    deadline, adapter, priority, texts = _CALL.unpack_from(body)
    numbers = np.frombuffer(body, dtype=np.int32, offset=_CALL.size)
    ids: list[TokenIds] = [numbers[1:]]
    if texts > 1:
        ends = (np.cumsum(numbers[:texts]) + texts).tolist()
        ids = [numbers[start:end] for start, end in pairwise([texts, *ends])]
    return TokenBatch(
        ids,
        adapters[adapter],
        None if deadline == math.inf else deadline,
        _PRIORITIES[priority],
        entered,
    )


def pack_result(result: EngineResult, finished: int) -> tuple[Body, ...]:
    """Return the body of a RESULT frame.

    Args:
        result: vectors and times of a call.
        finished: the engine's counter of completed work.
    """
    vectors = np.ascontiguousarray(result.vectors, dtype=np.float32)
    head = _RESULT.pack(finished, result.queued, result.computed, result.forward, result.processor)
    return head, vectors.data.cast("B") if vectors.size else b""


def unpack_result(body: Body, dimension: int) -> tuple[EngineResult, int]:
    """Return a call's result, and the engine's counter of completed work."""
    finished, *times = _RESULT.unpack_from(body)
    values: NDArray[np.float32] = np.frombuffer(body, dtype=np.float32, offset=_RESULT.size)
    return EngineResult(values.reshape(-1, dimension), *times), finished


def pack_error(error: TaskvecError) -> bytes:
    """Return the body of an ERROR frame."""
    return orjson.dumps(
        {
            "error": type(error).__name__,
            "message": error.message,
            "code": error.code,
            "param": error.param,
            "retry_after": error.retry_after,
        }
    )


def unpack_error(body: Body) -> TaskvecError:
    """Return the error of an ERROR frame, in the class that it had."""
    fields = orjson.loads(body)
    kind = _ERRORS.get(fields.pop("error"), TaskvecError)
    return kind(fields.pop("message"), **fields)


def pack_json(value: Any) -> bytes:
    """Return the body of a frame with any other content."""
    return orjson.dumps(value)


def unpack_json(body: Body) -> Any:
    """Return the content of such a frame."""
    return orjson.loads(body)
