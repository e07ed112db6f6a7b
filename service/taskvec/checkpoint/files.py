"""Read the files of a checkpoint: JSON, prompts, and safetensors headers and tensors.

Every file that is damaged, or that this process may not read, raises CheckpointError with a message
of one line.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from taskvec.errors import CheckpointError
from taskvec.permissions import read_failure

PROMPTS_FILE = "config_sentence_transformers.json"
"""File with the prompts, in the checkpoint folder and optionally in an adapter folder."""

DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
"""Supported dtypes: name in a safetensors header -> numpy dtype of the stored bytes.

numpy has no bfloat16, so its bits are read as integers.
"""


@contextmanager
def name_denial(path: Path) -> Iterator[None]:
    """Turn a ``PermissionError`` for a path into an error that says who may not read what.

    Raises:
        CheckpointError: this process may not read the path.
    """
    try:
        yield
    except PermissionError as error:
        raise CheckpointError(
            f"{path} cannot be read: {read_failure(path, error)}: change the owner or the mode, or "
            "run taskvec as another user."
        ) from None


def is_file(path: Path) -> bool:
    """Return whether a path is a file; a file that may not be read counts as one.

    Raises:
        CheckpointError: this process may not look into a folder of the path.
    """
    return stat.S_ISREG(_mode(path))


def is_folder(path: Path) -> bool:
    """Return whether a path is a folder.

    Raises:
        CheckpointError: this process may not look into a folder of the path.
    """
    return stat.S_ISDIR(_mode(path))


def list_folder(folder: Path) -> list[Path]:
    """Return the paths in a folder, sorted; none if it is missing or not a folder.

    Raises:
        CheckpointError: this process may not read the folder.
    """
    if not is_folder(folder):
        return []
    with name_denial(folder):
        return sorted(folder.iterdir())


def _mode(path: Path) -> int:
    """Return the mode of a path, 0 if it is missing; ``Path.is_file`` hides denials or not."""
    with name_denial(path):
        try:
            return path.stat().st_mode
        except PermissionError:
            raise
        except (OSError, ValueError):
            return 0


def require_file(file: Path) -> None:
    """Check that a file exists and can be opened; libraries do not say why they cannot open one.

    Raises:
        CheckpointError: it is missing, or this process may not read it.
    """
    if not is_file(file):
        raise CheckpointError(f"{file} is missing: copy or download the checkpoint again.")
    with name_denial(file), file.open("rb"):
        pass


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        CheckpointError: the file is missing, may not be read, or is not a JSON object.
    """
    value = _read_json_value(file)
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} must contain a JSON object: copy or download it again.")
    return value


def read_json_list(file: Path) -> list[Any]:
    """Return the list in a JSON file.

    Raises:
        CheckpointError: the file is missing, may not be read, or is not a JSON list.
    """
    value = _read_json_value(file)
    if not isinstance(value, list):
        raise CheckpointError(f"{file} must contain a JSON list: copy or download it again.")
    return value


def _read_json_value(file: Path) -> Any:
    try:
        with name_denial(file):
            return json.loads(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{file} is missing: copy or download the checkpoint again."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file} cannot be read as JSON ({error}): copy or download it again."
        ) from None


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor in a safetensors file, read from its header.

    Raises:
        CheckpointError: the file is missing or damaged, may not be read, or a tensor has an
            unsupported dtype.
    """
    require_file(file)
    try:
        with safe_open(file, framework="numpy") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            shapes = {name: tuple(tensor.get_shape()) for name, tensor in slices.items()}
            dtypes = {name: tensor.get_dtype() for name, tensor in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is damaged or cut short ({error}): copy or download it again."
        ) from None
    for name, dtype in dtypes.items():
        if dtype not in DTYPES:
            raise CheckpointError(
                f"{file}: {name!r} is stored as {dtype}; taskvec reads {', '.join(sorted(DTYPES))}."
            )
    return shapes


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of the backbone: one file, or the shards in the index.

    A single file that is missing is returned too: reading it raises the error.

    Raises:
        CheckpointError: the index is invalid, or only pickled weights exist.
    """
    index_file = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if is_file(single) or not is_file(index_file):
        if not is_file(single) and is_file(folder / "pytorch_model.bin"):
            raise CheckpointError(
                f"{folder} has only pickled weights, which are never loaded: convert them to "
                "model.safetensors."
            )
        return [single]
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_file} has no weight_map: copy or download it again.")
    names = sorted(set(map(str, weight_map.values())))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index_file} refers to the shard {name!r} outside its folder.")
    return [folder / name for name in names]


def read_prompts(file: Path) -> tuple[dict[str, str], str | None]:
    """Return the prompts of a config_sentence_transformers.json and the default prompt's name.

    Raises:
        CheckpointError: the file is missing, or its prompts are not strings.
    """
    config = read_json(file)
    prompts: Any = config.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(p, str) for p in prompts.values()):
        raise CheckpointError(f"{file}: prompts must be an object of strings.")
    default = config.get("default_prompt_name")
    if default is not None and (not isinstance(default, str) or default not in prompts):
        raise CheckpointError(f"{file}: default_prompt_name {default!r} is not among its prompts.")
    return dict(prompts), default


class TensorReader:
    """Reads single tensors, or some of their rows, through memory mapping.

    The files must have passed ``tensor_shapes``.
    """

    def __init__(self) -> None:
        self._headers: dict[Path, tuple[dict[str, Any], int]] = {}

    def read(self, file: Path, key: str, rows: NDArray[np.int64] | None = None) -> NDArray[Any]:
        """Read one tensor.

        Args:
            file: a safetensors file.
            key: name of the tensor in the file.
            rows: indices of the rows to read; None for all rows.

        Returns:
            float32, in the shape of the tensor.
        """
        header, data = self._header(file)
        entry: dict[str, Any] = header[key]
        start = data + int(entry["data_offsets"][0])
        stored = np.memmap(file, DTYPES[entry["dtype"]], "r", start, tuple(entry["shape"]))
        values = np.asarray(stored if rows is None else stored[rows])
        if entry["dtype"] == "BF16":  # bfloat16 is the upper half of a float32
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32)

    def _header(self, file: Path) -> tuple[dict[str, Any], int]:
        if file not in self._headers:
            with file.open("rb") as stream:
                size = int.from_bytes(stream.read(8), "little")
                self._headers[file] = (json.loads(stream.read(size)), 8 + size)
        return self._headers[file]
