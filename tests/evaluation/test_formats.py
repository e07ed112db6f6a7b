"""Output formats of vectors, compared with plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest

from taskvec.core.job import OutputType
from taskvec.errors import InvalidRequestError
from taskvec.evaluation.formats import ROWS, Form, forms_of

VECTORS = np.random.default_rng(0).normal(size=(6, 32)).astype(np.float32) * 3


def cosine(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


@pytest.mark.parametrize("dimensions", [32, 16, 8])
@pytest.mark.parametrize(
    ("output", "apart"),
    [(OutputType.FLOAT, 1e-6), (OutputType.FLOAT16, 1e-3), (OutputType.INT8, 0.02)],
)
def test_products_are_cosines_of_the_cut(output: OutputType, apart: float, dimensions: int) -> None:
    """The product of rows is the cosine of the truncated vectors, except for rounding."""
    rows = Form(dimensions, output).rows(VECTORS)
    assert rows.dtype == np.float32
    cut = VECTORS[:, :dimensions].tolist()
    truth = [[cosine(a, b) for b in cut] for a in cut]
    assert np.abs(rows @ rows.T - truth).max() <= apart


def test_int8_products_are_cosines_of_the_rounded() -> None:
    """The product of rows is the cosine of the integers that the service sends."""
    rows = Form(16, OutputType.INT8).rows(VECTORS)
    whole = [
        [round(value / max(map(abs, row)) * 127) for value in row]
        for row in VECTORS[:, :16].tolist()
    ]
    truth = [[cosine(a, b) for b in whole] for a in whole]
    assert np.abs(rows @ rows.T - truth).max() <= 1e-6


@pytest.mark.parametrize("dimensions", [32, 24, 8])
@pytest.mark.parametrize("output", [OutputType.BINARY, OutputType.UBINARY])
def test_binary_products_count_equal_bits(output: OutputType, dimensions: int) -> None:
    """The product of rows is exactly the dimensions less twice the Hamming distance."""
    rows = Form(dimensions, output).rows(VECTORS)
    bits = [[value > 0 for value in row] for row in VECTORS[:, :dimensions].tolist()]
    hamming = [[sum(x != y for x, y in zip(a, b, strict=True)) for b in bits] for a in bits]
    assert (rows @ rows.T == dimensions - 2 * np.array(hamming)).all()


def test_uint8_is_int8() -> None:
    """int8 and uint8 give the same rows."""
    signed, unsigned = (Form(32, OutputType(name)).rows(VECTORS) for name in ("int8", "uint8"))
    assert (signed == unsigned).all()


def test_chunks_do_not_change_rows() -> None:
    """More vectors than one chunk give the same rows."""
    many = np.random.default_rng(1).normal(size=(ROWS + 3, 8)).astype(np.float32)
    rows = Form(8, OutputType.INT8).rows(many)
    assert (rows[-5:] == Form(8, OutputType.INT8).rows(many[-5:])).all()


def test_a_zero_vector_has_products_of_0() -> None:
    """A zero vector has a row of zeros, not NaN."""
    rows = Form(8, OutputType.FLOAT).rows(np.zeros((1, 8), dtype=np.float32))
    assert (rows == 0).all()


@pytest.mark.parametrize(
    ("output", "size"), [("float", 512), ("float16", 256), ("int8", 128), ("binary", 16)]
)
def test_bytes_are_those_of_the_stored_vector(output: str, size: int) -> None:
    """A stored vector of 128 dimensions takes the expected number of bytes."""
    assert Form(128, OutputType(output)).bytes == size


def test_forms_are_every_width_in_every_type() -> None:
    """Each number of dimensions occurs once, largest first; the default is all dimensions."""
    outputs = [OutputType.FLOAT, OutputType.BINARY]
    assert forms_of(64, [16, 64, 16], outputs) == [
        Form(64, OutputType.FLOAT),
        Form(16, OutputType.FLOAT),
        Form(64, OutputType.BINARY),
        Form(16, OutputType.BINARY),
    ]
    assert forms_of(64, [], [OutputType.INT8]) == [Form(64, OutputType.INT8)]


@pytest.mark.parametrize(
    ("dimensions", "message"),
    [(0, "between 1 and 64"), (65, "between 1 and 64"), (12, "multiple of 8")],
)
def test_impossible_widths_are_refused(dimensions: int, message: str) -> None:
    """Dimensions beyond the model's, or that do not fill bytes, are refused."""
    with pytest.raises(InvalidRequestError, match=message):
        forms_of(64, [dimensions], [OutputType.FLOAT, OutputType.BINARY])
