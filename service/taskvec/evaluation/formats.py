"""What becomes of a vector: so many of its dimensions, in some output type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from taskvec.core.postprocess import MIN_NORM, OutputFormat, OutputType
from taskvec.errors import InvalidRequestError

Matrix = NDArray[np.float32]

ROWS = 1 << 13
"""Vectors that are turned at a time, so that what lies between takes little memory."""

_VALUE_BYTES = {OutputType.FLOAT: 4, OutputType.FLOAT16: 2, OutputType.INT8: 1, OutputType.UINT8: 1}


@dataclass(frozen=True, slots=True)
class Form:
    """The first ``dimensions`` values, in an output type."""

    dimensions: int
    output: OutputType

    @property
    def bytes(self) -> int:
        """Bytes that a stored vector takes."""
        if self.output.packed:
            return self.dimensions // 8
        return self.dimensions * _VALUE_BYTES[self.output]

    def rows(self, vectors: Matrix) -> Matrix:
        """What this form keeps of vectors, by the code that makes the service's answers.

        Args:
            vectors: float32 [n, full dimension], as the model gives them, not normalised.

        Returns:
            float32 [n, dimensions]: rows of one length, whose dot product is their likeness. Binary
            types give -1 and 1, so that equal Hamming distances give the very same product; other
            types give unit vectors, whose product is the cosine.
        """
        rows = np.empty((len(vectors), self.dimensions), dtype=np.float32)
        for begin in range(0, len(vectors), ROWS):
            piece = slice(begin, begin + ROWS)
            kept = OutputFormat(self.dimensions, (self.output,)).apply(vectors[piece])
            rows[piece] = read_vectors(kept[self.output], self.output)
        return rows


def read_vectors(vectors: NDArray[np.generic], output: OutputType) -> Matrix:
    """What a client makes of an answer's vectors: see ``Form.rows``.

    Args:
        vectors: [n, d], or [n, d / 8] for the binary types, as ``quantise`` gives them.
        output: their type.
    """
    if output.packed:
        offset = 0 if output is OutputType.UBINARY else 128
        bits = np.unpackbits((vectors.astype(np.int16) + offset).astype(np.uint8), axis=1)
        return bits.astype(np.float32) * 2 - 1
    values = vectors.astype(np.float32)
    if output is OutputType.UINT8:
        values -= 128
    lengths = np.sqrt(np.vecdot(values, values))[:, None]
    unit: Matrix = values / np.maximum(lengths, MIN_NORM)
    return unit


def forms_of(
    dimension: int, dimensions: Sequence[int], outputs: Sequence[OutputType]
) -> list[Form]:
    """Every form, the widest first.

    Args:
        dimension: the model's.
        dimensions: how many values to keep; all where empty.
        outputs: in which types.

    Raises:
        InvalidRequestError: dimensions that the model, or the output type, cannot give.
    """
    for wanted in dimensions:
        if not 1 <= wanted <= dimension:
            raise InvalidRequestError(
                f"--dimensions must lie between 1 and {dimension}, got {wanted}."
            )
        if wanted % 8 and any(output.packed for output in outputs):
            raise InvalidRequestError(
                f"Binary vectors pack 8 dimensions into a byte: --dimensions {wanted} is no "
                "multiple of 8; name the output types without binary ones."
            )
    widths = sorted(set(dimensions) or {dimension}, reverse=True)
    return [Form(wanted, output) for output in dict.fromkeys(outputs) for wanted in widths]
