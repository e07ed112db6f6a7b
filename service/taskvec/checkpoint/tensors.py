"""Tensors of safetensors files as float32 arrays, one at a time and without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_STORED: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}


class TensorReader:
    """Reads single tensors, or rows of them; files are mapped, never loaded whole.

    The files must have passed ``files.tensor_shapes``.
    """

    def __init__(self) -> None:
        self._headers: dict[Path, tuple[dict[str, Any], int]] = {}

    def read(self, file: Path, key: str, rows: NDArray[np.int64] | None = None) -> NDArray[Any]:
        """One tensor.

        Args:
            file: a safetensors file.
            key: the tensor's name in it.
            rows: read only these rows; None for all.

        Returns:
            float32, in the tensor's shape.
        """
        header, data = self._header(file)
        entry: dict[str, Any] = header[key]
        start = data + int(entry["data_offsets"][0])
        stored = np.memmap(file, _STORED[entry["dtype"]], "r", start, tuple(entry["shape"]))
        part = np.asarray(stored if rows is None else stored[rows])
        if entry["dtype"] == "BF16":  # the upper half of a float32
            return (part.astype(np.uint32) << 16).view(np.float32)
        return part.astype(np.float32)

    def _header(self, file: Path) -> tuple[dict[str, Any], int]:
        if file not in self._headers:
            with file.open("rb") as stream:
                size = int.from_bytes(stream.read(8), "little")
                self._headers[file] = (json.loads(stream.read(size)), 8 + size)
        return self._headers[file]
