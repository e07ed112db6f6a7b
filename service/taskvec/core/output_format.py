"""Post-processing of vectors: truncate dimensions, normalise, quantise. NumPy in, NumPy out."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from taskvec.errors import InvalidRequestError

MIN_NORM = np.float32(1e-19)
"""Smallest divisor when normalising: squares of smaller values underflow in float32."""


class OutputType(enum.Enum):
    """Number type of returned vectors."""

    FLOAT = "float"
    FLOAT16 = "float16"
    INT8 = "int8"
    UINT8 = "uint8"
    BINARY = "binary"
    UBINARY = "ubinary"

    @property
    def packed(self) -> bool:
        """Whether eight dimensions share one byte."""
        return self in (OutputType.BINARY, OutputType.UBINARY)

    def bytes_for(self, dimensions: int) -> int:
        """Return the size of one vector in bytes."""
        if self is OutputType.FLOAT:
            return 4 * dimensions
        if self is OutputType.FLOAT16:
            return 2 * dimensions
        return self.values_for(dimensions)

    def values_for(self, dimensions: int) -> int:
        """Return the number of values in one vector."""
        return dimensions // 8 if self.packed else dimensions


BASE64_NAME = "base64"
"""What clients call FLOAT in base64 where they name output types."""


class Encoding(enum.Enum):
    """Encoding of vectors in a response body; a metric label."""

    NUMBERS = "numbers"
    BASE64 = "base64"
    RAW = "raw"


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """Form in which vectors are returned.

    Attributes:
        dimensions: number of leading values to keep (Matryoshka).
        types: number types; one answer may carry several.
        normalized: scale each vector to L2 norm 1 after truncation, before quantisation.
        encoding: encoding in the response body.
        dimensions_field: the client's name for ``dimensions``, for errors.
        as_float32: with BASE64, the values of any type are encoded as little-endian float32, which
            clients decode that know no other type.
        names: the client's names of several types, for an answer with an object for each text;
            ``base64`` is FLOAT in base64 beside the other types. Empty for an answer of one type.
        echo_bytes: what the answer repeats of the request, in bytes.
        writes_vectors: whether the answer has the vectors; False if only numbers made of them.
        bytes: size of one text's vectors in the answer, of all types together.
    """

    dimensions: int
    types: tuple[OutputType, ...] = (OutputType.FLOAT,)
    normalized: bool = True
    encoding: Encoding = Encoding.NUMBERS
    dimensions_field: str = "dimensions"
    as_float32: bool = False
    names: tuple[str, ...] = ()
    echo_bytes: int = 0
    writes_vectors: bool = True
    bytes: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Compute the size, which is needed several times."""
        size = sum(kind.bytes_for(self.dimensions) for kind in self.types)
        if not self.writes_vectors:
            size = 0
        elif self.as_float32:
            size = sum(4 * kind.values_for(self.dimensions) for kind in self.types)
        elif BASE64_NAME in self.names and OutputType.FLOAT.value in self.names:
            size += 4 * self.dimensions  # the same vector twice
        object.__setattr__(self, "bytes", size)

    @property
    def answers(self) -> list[tuple[OutputType, Encoding]]:
        """Number type and encoding of each vector of a text."""
        if not self.names:
            return [(kind, self.encoding) for kind in self.types]
        return [
            (OutputType.FLOAT, Encoding.BASE64)
            if name == BASE64_NAME
            else (OutputType(name), self.encoding)
            for name in self.names
        ]

    def check(self, hidden_size: int) -> None:
        """Refuse dimensions that the model or an output type cannot give.

        Raises:
            InvalidRequestError: states the bounds.
        """
        dimensions, field = self.dimensions, self.dimensions_field
        if not 1 <= dimensions <= hidden_size:
            raise InvalidRequestError(
                f"{field} must be between 1 and {hidden_size}, got {dimensions}.",
                code="invalid_dimensions",
                param=field,
            )
        packed = next((kind for kind in self.types if kind.packed), None)
        if packed is not None and dimensions % 8:
            raise InvalidRequestError(
                f"{packed.value} vectors pack 8 dimensions into a byte: {field} must be a "
                f"multiple of 8, got {dimensions}.",
                code="invalid_dimensions",
                param=field,
            )

    def apply(self, vectors: NDArray[np.float32]) -> dict[OutputType, NDArray[np.generic]]:
        """Truncate, normalise and quantise, in this order.

        Args:
            vectors: float32 [n, hidden size].

        Returns:
            For each of ``types`` an array [n, dimensions], or [n, dimensions / 8] if packed. A
            zero vector stays zero.

        Raises:
            ValueError: a vector is not finite, which an engine must never return.
        """
        kept = vectors[:, : self.dimensions]
        norms = np.sqrt(np.vecdot(kept, kept))[:, None]
        if not np.isfinite(norms).all():
            raise ValueError("the engine returned a vector that is not finite")
        if self.normalized:
            kept = kept / np.maximum(norms, MIN_NORM)
        return {kind: quantise(kept, kind) for kind in self.types}


@lru_cache(maxsize=256)
def single_type_format(
    dimensions: int,
    kind: OutputType,
    normalized: bool,
    encoding: Encoding,
    dimensions_field: str = "dimensions",
    *,
    as_float32: bool = False,
) -> OutputFormat:
    """Return a format of one type; most requests have the same, and making one takes longer."""
    return OutputFormat(dimensions, (kind,), normalized, encoding, dimensions_field, as_float32)


def quantise(vectors: NDArray[np.float32], output: OutputType) -> NDArray[np.generic]:
    """Convert float32 [n, d] to an output type.

    * int8: ``round(127 * v / max|v|)`` per vector, which preserves cosines up to rounding;
      uint8: the same plus 128.
    * ubinary: one bit per dimension, 1 where the value is above 0, most significant bit first;
      binary: the same bytes minus 128, as Jina, Cohere and Voyage clients decode them.
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
