"""Cut, normalise, quantise: each held against plain Python floats, one value at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_st
from numpy.typing import NDArray

from taskvec.core.output_format import OutputFormat, OutputType, quantise
from taskvec.errors import InvalidRequestError

FLOATS = st.floats(min_value=-1e6, max_value=1e6, width=32)
MATRICES = numpy_st.arrays(
    np.float32,
    numpy_st.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=24),
    elements=FLOATS,
)
WHOLE_BYTES = MATRICES.map(lambda rows: np.repeat(rows, 8, axis=1))


def convert(
    vectors: NDArray[np.float32],
    dimensions: int | None,
    output: OutputType,
    *,
    normalized: bool,
) -> NDArray[np.generic]:
    """Apply a format of one type."""
    width = dimensions or vectors.shape[1]
    return OutputFormat(width, (output,), normalized).apply(vectors)[output]


def unit(row: list[float]) -> list[float]:
    length = math.sqrt(math.fsum(value * value for value in row))
    return [value / length if length else 0.0 for value in row]


def ones(row: list[float]) -> list[int]:
    """Bytes of eight dimensions each, the first dimension in the highest bit."""
    packed = []
    for start in range(0, len(row), 8):
        byte = 0
        for value in row[start : start + 8]:
            byte = 2 * byte + (1 if value > 0 else 0)
        packed.append(byte)
    return packed


@given(vectors=MATRICES, data=st.data(), normalized=st.booleans())
def test_floats_are_cut_then_normalised(
    vectors: NDArray[np.float32], data: st.DataObject, normalized: bool
) -> None:
    """The first dimensions are kept, and only then scaled to length 1."""
    dimensions = data.draw(st.none() | st.integers(min_value=1, max_value=vectors.shape[1]))
    result = convert(vectors, dimensions, OutputType.FLOAT, normalized=normalized)
    assert result.dtype == np.float32
    assert result.shape == (len(vectors), dimensions or vectors.shape[1])
    for row, got in zip(vectors.tolist(), result.tolist(), strict=True):
        cut = row[:dimensions]
        if not normalized:
            assert got == cut
        elif math.sqrt(math.fsum(value * value for value in cut)) > 1e-15:
            # below that, float32 squares run out of digits: no model gives such vectors
            assert got == pytest.approx(unit(cut), abs=1e-6)


def test_normalising_all_then_cutting_would_differ() -> None:
    """The order matters: a vector normalised before the cut would be too short."""
    result = convert(np.array([[3, 4, 12]], np.float32), 2, OutputType.FLOAT, normalized=True)
    assert result.tolist() == [pytest.approx([0.6, 0.8])]


@given(vectors=MATRICES)
def test_int8_is_the_nearest_step_of_the_largest_value(vectors: NDArray[np.float32]) -> None:
    """int8 is 127 * v / max|v|, rounded; uint8 lies 128 above it."""
    signed = quantise(vectors, OutputType.INT8)
    unsigned = quantise(vectors, OutputType.UINT8)
    assert signed.dtype == np.int8
    assert unsigned.dtype == np.uint8
    for row, got in zip(vectors.tolist(), signed.tolist(), strict=True):
        largest = max(map(abs, row))
        if largest < 1e-30:
            continue  # float32 runs out of digits: no model gives such vectors
        for value, step in zip(row, got, strict=True):
            # float32 may round a value half way between two steps to either
            assert abs(step - 127 * value / largest) <= 0.5 + 1e-4
        assert max(map(abs, got)) == 127
    assert (unsigned.astype(int) == signed.astype(int) + 128).all()


def test_int8_reaches_both_ends() -> None:
    """The largest value becomes 127 on its side; -128 is never used, so uint8 starts at 1."""
    vectors = np.array([[1, -1, 0.5, 0, -0.003], [-2, 1, 0, 0, 0]], np.float32)
    expected = [[127, -127, 64, 0, 0], [-127, 64, 0, 0, 0]]
    assert quantise(vectors, OutputType.INT8).tolist() == expected
    unsigned = quantise(vectors, OutputType.UINT8)
    assert unsigned.tolist() == [[value + 128 for value in row] for row in expected]


def test_int8_does_not_depend_on_the_length() -> None:
    """Quantising a normalised vector gives what quantising it as it is gives."""
    vectors = np.random.default_rng(0).standard_normal((40, 96)).astype(np.float32)
    scaled = convert(vectors, None, OutputType.INT8, normalized=True).astype(int)
    plain = convert(vectors, None, OutputType.INT8, normalized=False).astype(int)
    assert np.abs(scaled - plain).max() <= 1
    assert (scaled == plain).mean() > 0.99


@given(vectors=WHOLE_BYTES)
def test_ubinary_has_a_bit_for_each_positive_value(vectors: NDArray[np.float32]) -> None:
    """One bit a dimension, 1 above zero, the first in the highest bit."""
    result = quantise(vectors, OutputType.UBINARY)
    assert result.dtype == np.uint8
    assert result.tolist() == [ones(row) for row in vectors.tolist()]


@given(vectors=WHOLE_BYTES)
def test_binary_is_ubinary_minus_128(vectors: NDArray[np.float32]) -> None:
    """Signed bytes are offset binary, not the same bits read as two's complement."""
    result = quantise(vectors, OutputType.BINARY)
    assert result.dtype == np.int8
    assert result.tolist() == [[byte - 128 for byte in ones(row)] for row in vectors.tolist()]


def test_bit_order() -> None:
    """A worked example of both binary types: zero is no 1, the first dimension counts 128."""
    vectors = np.array([[1, 0, -1, 0, 0, 0, 0, 2], [-1, 9, 9, 9, 9, 9, 9, 9]], np.float32)
    assert quantise(vectors, OutputType.UBINARY).tolist() == [[129], [127]]
    assert quantise(vectors, OutputType.BINARY).tolist() == [[1], [-1]]


@given(vectors=MATRICES, data=st.data())
def test_each_type_has_its_shape(vectors: NDArray[np.float32], data: st.DataObject) -> None:
    """Rows stay, columns are the dimensions, an eighth of them where bits are packed."""
    output = data.draw(st.sampled_from(OutputType))
    wide = np.tile(vectors, (1, 8))
    dimensions = 8 * data.draw(st.integers(min_value=1, max_value=vectors.shape[1]))
    result = convert(wide, dimensions, output, normalized=True)
    assert result.shape == (len(vectors), dimensions // 8 if output.packed else dimensions)
    assert result.flags.c_contiguous, "its buffer is sent as it is"


@given(vectors=MATRICES)
def test_half_floats_are_rounded_floats(vectors: NDArray[np.float32]) -> None:
    """float16 is the normalised vector in half precision."""
    half = convert(vectors, None, OutputType.FLOAT16, normalized=True)
    whole = convert(vectors, None, OutputType.FLOAT, normalized=True)
    assert half.dtype == np.float16
    assert np.abs(half.astype(np.float64) - whole.astype(np.float64)).max() <= 2**-11


@pytest.mark.parametrize(
    ("output", "value"),
    [
        (OutputType.FLOAT, 0),
        (OutputType.FLOAT16, 0),
        (OutputType.INT8, 0),
        (OutputType.UINT8, 128),
        (OutputType.UBINARY, 0),
        (OutputType.BINARY, -128),
    ],
)
def test_a_zero_vector_stays_zero(output: OutputType, value: int) -> None:
    """A vector of zeros is every type's zero, without a warning."""
    result = convert(np.zeros((2, 16), np.float32), None, output, normalized=True)
    assert set(result.ravel().tolist()) == {value}


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("output", OutputType)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_vector_that_is_not_finite_is_an_error(
    output: OutputType, normalized: bool, bad: float
) -> None:
    """NaN or infinity among good vectors is never answered, whatever the type."""
    vectors = np.ones((3, 16), np.float32)
    vectors[1, 5] = bad
    with pytest.raises(ValueError, match="not finite"):
        convert(vectors, None, output, normalized=normalized)


def test_the_engine_keeps_its_vectors() -> None:
    """Finishing does not write into the array it is given."""
    vectors = np.random.default_rng(1).standard_normal((4, 16)).astype(np.float32)
    before = vectors.copy()
    for output in OutputType:
        convert(vectors, 8, output, normalized=True)
    assert (vectors == before).all()


def test_several_types_are_those_of_single_formats() -> None:
    """A format of several types gives for each what a format of that type alone gives."""
    vectors = np.random.default_rng(2).standard_normal((4, 32)).astype(np.float32)
    together = OutputFormat(16, tuple(OutputType)).apply(vectors)
    assert list(together) == list(OutputType)
    for output, found in together.items():
        alone = convert(vectors, 16, output, normalized=True)
        assert found.dtype == alone.dtype
        assert (found == alone).all()


@pytest.mark.parametrize("output", OutputType)
@pytest.mark.parametrize("dimensions", [8, 16, 248, None])
def test_the_size_of_a_vector_is_known_before(output: OutputType, dimensions: int | None) -> None:
    """``bytes_for`` is the size of one row, and a format's that of all its types."""
    vectors = np.ones((1, 256), np.float32)
    row = convert(vectors, dimensions, output, normalized=True)
    assert output.bytes_for(dimensions or 256) == row.nbytes
    both = OutputFormat(dimensions or 256, (output, OutputType.FLOAT))
    assert both.bytes == row.nbytes + 4 * (dimensions or 256)


@pytest.mark.parametrize(
    ("dimensions", "types"),
    [
        (0, [OutputType.FLOAT]),
        (-1, [OutputType.FLOAT]),
        (257, [OutputType.FLOAT]),
        (12, [OutputType.BINARY]),
        (12, [OutputType.UBINARY]),
        (12, [OutputType.FLOAT, OutputType.INT8, OutputType.BINARY]),
    ],
)
def test_bad_dimensions_are_refused(dimensions: int, types: list[OutputType]) -> None:
    """Dimensions outside the model's, or not whole bytes of a packed type, are refused by name."""
    with pytest.raises(InvalidRequestError) as refused:
        OutputFormat(dimensions, tuple(types)).check(256)
    assert (refused.value.code, refused.value.param) == ("invalid_dimensions", "dimensions")


@pytest.mark.parametrize("dimensions", [1, 12, 256])
def test_good_dimensions_pass(dimensions: int) -> None:
    """Every number of dimensions from 1 to the model's is served as floats."""
    OutputFormat(dimensions, (OutputType.FLOAT, OutputType.INT8)).check(256)
