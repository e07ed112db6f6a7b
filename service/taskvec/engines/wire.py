"""What a gateway and a taskvec server say to each other: token ids out, vectors back, all binary.

The request's body is little-endian int32: the number of texts; for each text the number of its
adapter in the ``x-adapters`` header and its length; then all ids, end to end. The header has the
adapters' names with commas between them; an empty name is the bare backbone. The answer is the
row-major little-endian float32 matrix, one vector a text, not normalised.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from taskvec.engines.base import TokenIds

WIRE_PATH = "/v1/engine/embed"
WIRE_TYPE = "application/octet-stream"
ADAPTERS_HEADER = "x-adapters"

_INT = np.dtype("<i4")


def pack_texts(texts: Sequence[TokenIds], adapters: Sequence[str | None]) -> tuple[str, bytes]:
    """The adapters' header and the body that ask for some texts.

    Args:
        texts: int32 ids [length] of each.
        adapters: the adapter of each.
    """
    names = list(dict.fromkeys(adapters))
    numbers = {name: number for number, name in enumerate(names)}
    head = np.empty(1 + 2 * len(texts), dtype=_INT)
    head[0] = len(texts)
    head[1::2] = [numbers[adapter] for adapter in adapters]
    head[2::2] = [len(text) for text in texts]
    body = np.concatenate([head, *texts], dtype=_INT)
    return ",".join(name or "" for name in names), body.tobytes()


def unpack_texts(header: str, body: bytes) -> tuple[list[TokenIds], list[str | None]]:
    """The texts of a body and the adapter of each.

    Raises:
        ValueError: the body is not what ``pack_texts`` makes; the message says how.
    """
    if len(body) % _INT.itemsize or not body:
        raise ValueError(f"{len(body)} bytes are no list of 32-bit numbers")
    numbers = np.frombuffer(body, dtype=_INT)
    texts = int(numbers[0])
    if texts < 1 or 1 + 2 * texts > len(numbers):
        raise ValueError(f"{texts} texts do not fit into {len(body)} bytes")
    names = [name or None for name in header.split(",")]
    chosen, lengths = numbers[1 : 1 + 2 * texts : 2], numbers[2 : 2 + 2 * texts : 2]
    if chosen.min() < 0 or chosen.max() >= len(names):
        raise ValueError(f"a text has an adapter that the header does not name: {header[:200]!r}")
    if lengths.min() < 1 or int(lengths.sum(dtype=np.int64)) != len(numbers) - 1 - 2 * texts:
        raise ValueError("the lengths of the texts do not add up to the ids that follow")
    ids = np.split(numbers[1 + 2 * texts :], np.cumsum(lengths[:-1]))
    return [text.astype(np.int32, copy=False) for text in ids], [names[i] for i in chosen]
