"""From an engine's vectors to the asked ones: cut, normalise, quantise; numpy in, numpy out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from taskvec.core.job import OutputType

SMALLEST = np.float32(1e-19)
"""Least length to divide by: the squares of smaller values vanish in float32."""


def finish(
    vectors: NDArray[np.float32], dimensions: int | None, output: OutputType, *, normalized: bool
) -> NDArray[np.generic]:
    """Cut, normalise and quantise, in this order.

    Args:
        vectors: float32 [n, d].
        dimensions: keep the first so many values; None for all.
        output: number type of the result.
        normalized: scale each vector to L2 length 1; a zero vector stays zero.

    Returns:
        [n, dimensions]; [n, dimensions / 8] for the binary types.

    Raises:
        ValueError: a vector is not finite: an engine must never give such a one.
    """
    cut = vectors[:, :dimensions]
    lengths = np.sqrt(np.vecdot(cut, cut))[:, None]
    if not np.isfinite(lengths).all():
        raise ValueError("the engine gave a vector that is not finite")
    if normalized:
        cut = cut / np.maximum(lengths, SMALLEST)
    return quantise(cut, output)


def quantise(vectors: NDArray[np.float32], output: OutputType) -> NDArray[np.generic]:
    """Turn float32 [n, d] into the output type.

    * int8: ``round(127 * v / max|v|)`` per vector, which leaves cosines unchanged but for rounding;
      uint8: the same plus 128.
    * ubinary: one bit a dimension, 1 where the value is above 0, most significant bit first;
      binary: the same bytes minus 128, which is how Jina, Cohere and Voyage clients decode them.
    """
    if output is OutputType.FLOAT:
        return np.ascontiguousarray(vectors)
    if output is OutputType.FLOAT16:
        return vectors.astype(np.float16)
    if output.packed:
        bits = np.packbits(vectors > 0, axis=1)
        if output is OutputType.UBINARY:
            return bits
        offset: NDArray[np.int8] = (bits.astype(np.int16) - 128).astype(np.int8)
        return offset
    largest = np.abs(vectors).max(axis=1, keepdims=True)
    steps: NDArray[np.float32] = np.rint(vectors / np.where(largest > 0, largest, 1) * 127)
    if output is OutputType.INT8:
        return steps.astype(np.int8)
    return (steps + 128).astype(np.uint8)
