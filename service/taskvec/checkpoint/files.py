"""Reading the files of a checkpoint, with one sentence for each way they can be damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
