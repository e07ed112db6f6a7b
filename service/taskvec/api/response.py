"""Vectors to response bytes."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson
import pybase64
from numpy.typing import NDArray
from starlette.responses import Response

from taskvec.core.job import Embeddings

OCTET_STREAM = "application/octet-stream"

ENCODE_INLINE = 1 << 18
"""Up to so many bytes of vectors are encoded in the event loop: a millisecond or two at most."""

DUMP_VALUES = 1 << 16
"""Values that are written as JSON in one go: a millisecond or two."""


class Transport(enum.Enum):
    """How vectors travel."""

    NUMBERS = "numbers"
    BASE64 = "base64"
    RAW = "raw"


async def encode_off_loop(result: Embeddings, transport: Transport, model: str) -> Response:
    """``encode``, in a thread where it would block the event loop for long."""
    cost = result.vectors.nbytes * (4 if transport is Transport.NUMBERS else 1)
    if cost <= ENCODE_INLINE:
        return encode(result, transport, model)
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(None, encode, result, transport, model)


def encode(result: Embeddings, transport: Transport, model: str) -> Response:
    """The response to a finished job.

    NUMBERS and BASE64 give OpenAI's JSON; RAW gives the row-major little-endian matrix with its
    shape, type and token count in headers.
    """
    vectors = _little_endian(result.vectors)
    if transport is Transport.RAW:
        return Response(
            vectors.tobytes(),
            media_type=OCTET_STREAM,
            headers={
                "x-embedding-shape": "{},{}".format(*vectors.shape),
                "x-embedding-dtype": vectors.dtype.name,
                "x-prompt-tokens": str(result.tokens),
            },
        )
    rows: list[Any]
    if transport is Transport.BASE64:
        rows = [pybase64.b64encode_as_string(row) for row in vectors]
    else:
        rows = list(vectors)
    data = [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(rows)]
    usage = {"prompt_tokens": result.tokens, "total_tokens": result.tokens}
    body = b'{"object":"list","model":%b,"data":[%b],"usage":%b}' % (
        orjson.dumps(model),
        b",".join(_elements(data, rows_at_once=max(1, DUMP_VALUES // vectors.shape[1]))),
        orjson.dumps(usage),
    )
    return Response(body, media_type="application/json")


def _elements(entries: list[dict[str, Any]], rows_at_once: int) -> Iterator[bytes]:
    """A JSON list's elements, in pieces: other threads wait while orjson writes one."""
    for begin in range(0, len(entries), rows_at_once):
        piece = entries[begin : begin + rows_at_once]
        yield orjson.dumps(piece, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]


def _little_endian(vectors: NDArray[np.generic]) -> NDArray[np.generic]:
    little = vectors.dtype.newbyteorder("<")
    return np.ascontiguousarray(vectors, dtype=little)
