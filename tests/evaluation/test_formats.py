"""What is left of vectors in a output_format, held against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest

from taskvec.core.output_format import OutputFormat, OutputType
from taskvec.errors import InvalidRequestError
from taskvec.evaluation.formats import ROWS_PER_STEP, comparable_rows, formats_of

VECTORS = np.random.default_rng(0).normal(size=(6, 32)).astype(np.float32) * 3


def cosine(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


@pytest.mark.parametrize("dimensions", [32, 16, 8])
@pytest.mark.parametrize(
    ("output", "apart"),
    [(OutputType.FLOAT, 1e-6), (OutputType.FLOAT16, 1e-3), (OutputType.INT8, 0.02)],
)
def test_products_are_cosines_of_the_cut(output: OutputType, apart: float, dimensions: int) -> None:
    """Rows are unit vectors whose product is the cosine of the first values, but for rounding."""
    rows = comparable_rows(VECTORS, OutputFormat(dimensions, (output,)))
    assert rows.dtype == np.float32
    cut = VECTORS[:, :dimensions].tolist()
    truth = [[cosine(a, b) for b in cut] for a in cut]
    assert np.abs(rows @ rows.T - truth).max() <= apart


def test_int8_products_are_cosines_of_the_rounded() -> None:
    """The cosine is that of the whole numbers which the service sends."""
    rows = comparable_rows(VECTORS, OutputFormat(16, (OutputType.INT8,)))
    whole = [
        [round(value / max(map(abs, row)) * 127) for value in row]
        for row in VECTORS[:, :16].tolist()
    ]
    truth = [[cosine(a, b) for b in whole] for a in whole]
    assert np.abs(rows @ rows.T - truth).max() <= 1e-6


@pytest.mark.parametrize("dimensions", [32, 24, 8])
@pytest.mark.parametrize("output", [OutputType.BINARY, OutputType.UBINARY])
def test_binary_products_count_equal_bits(output: OutputType, dimensions: int) -> None:
    """The product is the dimensions less twice the Hamming distance, exactly."""
    rows = comparable_rows(VECTORS, OutputFormat(dimensions, (output,)))
    bits = [[value > 0 for value in row] for row in VECTORS[:, :dimensions].tolist()]
    hamming = [[sum(x != y for x, y in zip(a, b, strict=True)) for b in bits] for a in bits]
    assert (rows @ rows.T == dimensions - 2 * np.array(hamming)).all()


def test_uint8_is_int8() -> None:
    """The two types hold the same values."""
    signed, unsigned = (
        comparable_rows(VECTORS, OutputFormat(32, (OutputType(name),)))
        for name in ("int8", "uint8")
    )
    assert (signed == unsigned).all()


def test_many_vectors_are_turned_as_few_are() -> None:
    """More vectors than are turned at a time give each row as it is alone."""
    many = np.random.default_rng(1).normal(size=(ROWS_PER_STEP + 3, 8)).astype(np.float32)
    rows = comparable_rows(many, OutputFormat(8, (OutputType.INT8,)))
    assert (rows[-5:] == comparable_rows(many[-5:], OutputFormat(8, (OutputType.INT8,)))).all()


def test_a_zero_vector_is_like_nothing() -> None:
    """Its products are 0, not undefined."""
    rows = comparable_rows(np.zeros((1, 8), dtype=np.float32), OutputFormat(8, (OutputType.FLOAT,)))
    assert (rows == 0).all()


@pytest.mark.parametrize(
    ("output", "size"), [("float", 512), ("float16", 256), ("int8", 128), ("binary", 16)]
)
def test_bytes_are_those_of_the_stored_vector(output: str, size: int) -> None:
    """128 dimensions take so many bytes."""
    assert OutputFormat(128, (OutputType(output),)).bytes == size


def test_forms_are_every_width_in_every_type() -> None:
    """Each width once, the widest first; all dimensions where none are named."""
    outputs = [OutputType.FLOAT, OutputType.BINARY]
    assert formats_of(64, [16, 64, 16], outputs) == [
        OutputFormat(64, (OutputType.FLOAT,)),
        OutputFormat(16, (OutputType.FLOAT,)),
        OutputFormat(64, (OutputType.BINARY,)),
        OutputFormat(16, (OutputType.BINARY,)),
    ]
    assert formats_of(64, [], [OutputType.INT8]) == [OutputFormat(64, (OutputType.INT8,))]


@pytest.mark.parametrize(
    ("dimensions", "said"),
    [(0, "between 1 and 64"), (65, "between 1 and 64"), (12, "multiple of 8")],
)
def test_impossible_widths_are_refused(dimensions: int, said: str) -> None:
    """Dimensions that the model lacks, or that fill no bytes, are refused with the bounds."""
    with pytest.raises(InvalidRequestError, match=said):
        formats_of(64, [dimensions], [OutputType.FLOAT, OutputType.BINARY])
