"""Binary format between a gateway and a taskvec server: token ids in, vectors out.

The request body is little-endian int32: the number of texts; for each text the index of its adapter
in the ``x-adapters`` header and its length; then all ids, concatenated. The header contains the
names of the adapters, separated by commas; an empty name is the bare backbone. The response body is
a row-major little-endian float32 matrix [texts, dimension], not normalised. Errors are JSON, as on
all routes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import orjson

from taskvec.engines.base import TokenIds
from taskvec.errors import TEXT_CODES, TaskvecError

WIRE_PATH = "/v1/engine/embed"
WIRE_TYPE = "application/octet-stream"
ADAPTERS_HEADER = "x-adapters"

_INT = np.dtype("<i4")


def pack_texts(texts: Sequence[TokenIds], adapters: Sequence[str | None]) -> tuple[str, bytes]:
    """Return the ``x-adapters`` header and the body of a request.

    Args:
        texts: int32 token ids [length] of each text.
        adapters: the adapter of each text; None for the bare backbone.
    """
    names = list(dict.fromkeys(adapters))
    indices = {name: index for index, name in enumerate(names)}
    head = np.empty(1 + 2 * len(texts), dtype=_INT)
    head[0] = len(texts)
    head[1::2] = [indices[adapter] for adapter in adapters]
    head[2::2] = [len(text) for text in texts]
    body = np.concatenate([head, *texts], dtype=_INT)
    return ",".join(name or "" for name in names), body.tobytes()


def count_texts(body: bytes) -> int:
    """Return the number of texts of a request, without unpacking them.

    Raises:
        ValueError: the body is invalid; the message has the reason.
    """
    if len(body) % _INT.itemsize or not body:
        raise ValueError(f"{len(body)} bytes are not a list of 32-bit numbers")
    (texts,) = np.frombuffer(body, dtype=_INT, count=1).tolist()
    if texts < 1 or 1 + 2 * texts > len(body) // _INT.itemsize:
        raise ValueError(f"{texts} texts do not fit into {len(body)} bytes")
    return int(texts)


def unpack_texts(header: str, body: bytes) -> tuple[list[TokenIds], list[str | None]]:
    """Return the texts of a request, and the adapter of each text.

    Raises:
        ValueError: the header or the body is invalid; the message has the reason.
    """
    texts = count_texts(body)
    numbers = np.frombuffer(body, dtype=_INT)
    names = [name or None for name in header.split(",")]
    indices, lengths = numbers[1 : 1 + 2 * texts : 2], numbers[2 : 2 + 2 * texts : 2]
    if indices.min() < 0 or indices.max() >= len(names):
        raise ValueError(
            f"a text has an adapter that the header does not contain: {header[:200]!r}"
        )
    if lengths.min() < 1 or int(lengths.sum(dtype=np.int64)) != len(numbers) - 1 - 2 * texts:
        raise ValueError("the lengths of the texts do not match the number of ids")
    ids = np.split(numbers[1 + 2 * texts :], np.cumsum(lengths[:-1]))
    return [text.astype(np.int32, copy=False) for text in ids], [names[i] for i in indices]


def read_text_error(body: str) -> TaskvecError | None:
    """Return the error of a response with status 500 if it concerns one text; None otherwise."""
    try:
        given = orjson.loads(body)["error"]
        code, message, param = given["code"], str(given["message"]), str(given["param"])
    except (ValueError, TypeError, LookupError):
        return None
    error = TaskvecError(message, code=str(code), param=param)
    return error if error.code in TEXT_CODES and error.text is not None else None
