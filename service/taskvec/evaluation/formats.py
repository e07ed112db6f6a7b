"""Output formats under evaluation, and the rows that a client compares."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from taskvec.core.output_format import MIN_NORM, OutputFormat, OutputType
from taskvec.errors import InvalidRequestError

Matrix = NDArray[np.float32]

ROWS_PER_STEP = 1 << 13
"""Vectors that are converted at a time, which limits the memory of intermediate results."""


def formats_of(
    hidden_size: int, dimensions: Sequence[int], outputs: Sequence[OutputType]
) -> list[OutputFormat]:
    """Return a format of one type for each combination, the widest first.

    Args:
        hidden_size: width of the model's vectors.
        dimensions: numbers of leading values to keep; empty for all values.
        outputs: number types.

    Raises:
        InvalidRequestError: dimensions that the model or an output type cannot give.
    """
    for count in dimensions:
        if not 1 <= count <= hidden_size:
            raise InvalidRequestError(
                f"--dimensions must be between 1 and {hidden_size}, got {count}."
            )
        if count % 8 and any(output.packed for output in outputs):
            raise InvalidRequestError(
                f"Binary vectors pack 8 dimensions into a byte: --dimensions {count} is not a "
                "multiple of 8; name output types without binary ones."
            )
    widths = sorted(set(dimensions) or {hidden_size}, reverse=True)
    return [OutputFormat(count, (output,)) for output in dict.fromkeys(outputs) for count in widths]


def comparable_rows(vectors: Matrix, output: OutputFormat) -> Matrix:
    """Convert vectors to a format, with the service's own code, and read them as a client does.

    Args:
        vectors: float32 [n, hidden size] as the model returns them, not normalised.
        output: a format of one type.

    Returns:
        float32 [n, dimensions]: see ``read_vectors``.
    """
    (kind,) = output.types
    rows = np.empty((len(vectors), output.dimensions), dtype=np.float32)
    for start in range(0, len(vectors), ROWS_PER_STEP):
        piece = slice(start, start + ROWS_PER_STEP)
        rows[piece] = read_vectors(output.apply(vectors[piece])[kind], kind)
    return rows


def read_vectors(vectors: NDArray[np.generic], output: OutputType) -> Matrix:
    """Convert a service's vectors to rows whose dot product is their similarity.

    Args:
        vectors: [n, d], or [n, d / 8] for the binary types, as ``quantise`` returns them.
        output: their type.

    Returns:
        float32 [n, d]. Binary types give -1 and 1, so that equal Hamming distances give exactly the
        same product; other types give unit vectors, whose product is the cosine.
    """
    if output.packed:
        offset = 0 if output is OutputType.UBINARY else 128
        bits = np.unpackbits((vectors.astype(np.int16) + offset).astype(np.uint8), axis=1)
        return bits.astype(np.float32) * 2 - 1
    values = vectors.astype(np.float32)
    if output is OutputType.UINT8:
        values -= 128
    norms = np.sqrt(np.vecdot(values, values))[:, None]
    unit: Matrix = values / np.maximum(norms, MIN_NORM)
    return unit
