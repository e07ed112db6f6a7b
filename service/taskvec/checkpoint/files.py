"""Reading the files of a checkpoint, with one sentence for each way they can be damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from taskvec.errors import CheckpointError

PROMPTS_FILE = "config_sentence_transformers.json"
"""Of a checkpoint, and of an adapter that has prompts of its own."""

DTYPES = frozenset({"F32", "BF16", "F16"})


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file is missing or holds no JSON object.
    """
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{file} is missing: copy or download the checkpoint again."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file} cannot be read as JSON ({error}): copy or download it again."
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds no JSON object: copy or download it again.")
    return value


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a safetensors file, from its header alone.

    Raises:
        CheckpointError: the file is missing, truncated, or holds a number type we do not read.
    """
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: copy or download the checkpoint again.")
    try:
        with safe_open(file, framework="numpy") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            dtypes = {name: part.get_dtype() for name, part in slices.items()}
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
    """The safetensors files of the backbone: one, or the shards that the index names.

    Raises:
        CheckpointError: there is none, or only pickled weights.
    """
    index_file = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file() or not index_file.is_file():
        if not single.is_file() and (folder / "pytorch_model.bin").is_file():
            raise CheckpointError(
                f"{folder} has only pickled weights, which are never loaded: convert them to "
                "model.safetensors."
            )
        return [single]
    shards = read_json(index_file).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{index_file} has no weight_map: copy or download it again.")
    names = sorted(set(map(str, shards.values())))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index_file} names the shard {name!r} outside its folder.")
    return [folder / name for name in names]


def read_prompts(file: Path) -> tuple[dict[str, str], str | None]:
    """The prompts of a config_sentence_transformers.json, and the name of the default one.

    Raises:
        CheckpointError: the file is missing, or says something else than names and strings.
    """
    config = read_json(file)
    prompts: Any = config.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(p, str) for p in prompts.values()):
        raise CheckpointError(f"{file}: prompts is no object of strings.")
    default = config.get("default_prompt_name")
    if default is not None and (not isinstance(default, str) or default not in prompts):
        raise CheckpointError(f"{file}: default_prompt_name {default!r} is none of its prompts.")
    return dict(prompts), default


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
