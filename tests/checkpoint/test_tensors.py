"""Single tensors of safetensors files, read as float32 without torch."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.checkpoint.files import TensorReader, tensor_shapes

WIDTHS = {"F32": 4, "F16": 2, "BF16": 2}
dtypes = pytest.mark.parametrize("dtype", WIDTHS)


def write(file: Path, tensors: Mapping[str, tuple[str, NDArray[Any]]], pad: int = 0) -> None:
    """Write a safetensors file by hand: numpy has no bfloat16, and headers may end anywhere."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, values) in tensors.items():
        stored = encoded(dtype, values)
        place = [len(data), len(data) + len(stored)]
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": place}
        data += stored
    text = json.dumps(header).encode() + b" " * pad
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def encoded(dtype: str, values: NDArray[Any]) -> bytes:
    """Return the stored bytes of values."""
    if dtype == "BF16":
        return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return values.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()


def exact(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    """Return random values that every dtype represents exactly."""
    whole = np.random.default_rng(seed).integers(-100, 101, shape)
    return (whole / 64).astype(np.float32)


@dtypes
@pytest.mark.parametrize("pad", range(9))
def test_every_dtype_is_read_as_float32(tmp_path: Path, dtype: str, pad: int) -> None:
    """Values are read exactly, for any length of the header."""
    values = exact(5, 7)
    write(tmp_path / "x.safetensors", {"a": ("F16", exact(3)), "b": (dtype, values)}, pad)
    assert tensor_shapes(tmp_path / "x.safetensors")["b"] == (5, 7)
    read = TensorReader().read(tmp_path / "x.safetensors", "b")
    assert read.dtype == np.float32
    assert np.array_equal(read, values)


@dtypes
@pytest.mark.parametrize("shape", [(1,), (9,), (1, 1), (4, 3), (2, 3, 4)], ids=str)
def test_shapes_are_kept(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    """A tensor has the shape of its header."""
    values = exact(*shape)
    write(tmp_path / "x.safetensors", {"a": (dtype, values)})
    read = TensorReader().read(tmp_path / "x.safetensors", "a")
    assert read.shape == shape
    assert np.array_equal(read, values)


@dtypes
@pytest.mark.parametrize("rows", [[0], [5], [3, 3, 0, 5], list(range(6)), []], ids=str)
def test_rows_have_the_requested_order(tmp_path: Path, dtype: str, rows: list[int]) -> None:
    """Rows are returned in the requested order, with duplicates."""
    values = exact(6, 4)
    write(tmp_path / "x.safetensors", {"a": (dtype, values)})
    chosen = np.array(rows, dtype=np.int64)
    read = TensorReader().read(tmp_path / "x.safetensors", "a", chosen)
    assert (read.dtype, read.shape) == (np.float32, (len(rows), 4))
    assert np.array_equal(read, values[chosen])


@dtypes
@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_bit_pattern_is_read_exactly(tmp_path: Path, dtype: str, data: Any) -> None:
    """All values of a dtype are read exactly, including infinities, subnormals and signed zeros."""
    bits = 8 * WIDTHS[dtype]
    patterns = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=20))
    stored = np.array(patterns, dtype=f"<u{WIDTHS[dtype]}")
    if dtype == "BF16":
        truth = (stored.astype(np.uint32) << 16).view(np.float32)
        values = truth
    else:
        values = stored.view({"F32": "<f4", "F16": "<f2"}[dtype])
        with np.errstate(invalid="ignore"):  # widening a signalling NaN
            truth = values.astype(np.float32)
    numbers = ~np.isnan(truth)
    write(tmp_path / "x.safetensors", {"a": (dtype, np.where(numbers, values, 0))})
    read = TensorReader().read(tmp_path / "x.safetensors", "a")
    wanted = np.where(numbers, truth, np.float32(0)).astype(np.float32)
    assert np.array_equal(read.view(np.uint32), wanted.view(np.uint32))


@dtypes
def test_arrays_are_writable_copies(tmp_path: Path, dtype: str) -> None:
    """Writing to an array succeeds and does not change the file."""
    write(tmp_path / "x.safetensors", {"a": (dtype, exact(6, 4))})
    before = (tmp_path / "x.safetensors").read_bytes()
    reader = TensorReader()
    for rows in (None, np.array([1, 2])):
        read = reader.read(tmp_path / "x.safetensors", "a", rows)
        read += 1
    assert np.array_equal(reader.read(tmp_path / "x.safetensors", "a"), exact(6, 4))
    assert (tmp_path / "x.safetensors").read_bytes() == before


def test_files_do_not_mix(tmp_path: Path) -> None:
    """One reader reads the same name from several files with different layouts."""
    write(tmp_path / "1.safetensors", {"a": ("BF16", exact(2, 3, seed=1))})
    write(tmp_path / "2.safetensors", {"x": ("F32", exact(5)), "a": ("F16", exact(4, seed=2))})
    reader = TensorReader()
    for _ in range(2):  # without and with cached headers
        one = reader.read(tmp_path / "1.safetensors", "a")
        two = reader.read(tmp_path / "2.safetensors", "a")
        assert np.array_equal(one, exact(2, 3, seed=1))
        assert np.array_equal(two, exact(4, seed=2))


def test_rows_do_not_load_the_table(tmp_path: Path) -> None:
    """Reading a few rows of a large embedding table takes memory for those rows only."""
    rows, columns = 1 << 16, 1 << 11
    file = tmp_path / "x.safetensors"
    entry = {"dtype": "F16", "shape": [rows, columns], "data_offsets": [0, 2 * rows * columns]}
    text = json.dumps({"a": entry}).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + 2 * rows * columns)  # a sparse file of 256 MiB
    tracemalloc.start()
    try:
        read = TensorReader().read(file, "a", np.array([0, 7, rows - 1]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert read.shape == (3, columns)
    assert not read.any()
    assert peak < 1 << 20


def test_files_of_the_safetensors_library(tmp_path: Path) -> None:
    """Files of the safetensors library are read as by the library."""
    tensors = {"a.weight": exact(3, 5), "b": exact(4).astype(np.float16)}
    save_file(tensors, tmp_path / "x.safetensors")
    reader = TensorReader()
    for name, values in tensors.items():
        assert np.array_equal(reader.read(tmp_path / "x.safetensors", name), values)


def test_the_default_model(default_checkpoint: Checkpoint) -> None:
    """Every tensor of a real checkpoint is read as by the safetensors library."""
    reader = TensorReader()
    ours = {file for file, _ in default_checkpoint.weights.values()}
    for file in [*ours, *(adapter.weights for adapter in default_checkpoint.adapters)]:
        for name, values in load_file(file).items():
            assert np.array_equal(reader.read(file, name), values.astype(np.float32)), name
