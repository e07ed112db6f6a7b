"""Read and check a checkpoint folder; only the headers of the weight files are read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskvec.checkpoint.adapters import Adapter, read_adapters
from taskvec.checkpoint.backbone import Backbone, ModelCard, matryoshka_dimensions, read_backbone
from taskvec.checkpoint.files import (
    PROMPTS_FILE,
    is_file,
    read_json,
    read_prompts,
    require_file,
    tensor_shapes,
    weight_files,
)
from taskvec.checkpoint.merged_task import MergedTask, find_merged_task, repository_names
from taskvec.checkpoint.omni import is_omni_name, omni_error, states_omni
from taskvec.checkpoint.pooling import check_pooling
from taskvec.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The contents of a checkpoint folder, without the weights.

    Attributes:
        folder: the checkpoint folder.
        backbone: shape of the transformer.
        weights: tensor name (without a ``model.`` prefix) -> (file, key in that file).
        adapters: the LoRA adapters; empty for a plain backbone.
        prompts: prompt name -> prefix, for example ``{"query": "Query: "}``.
        default_prompt: name of the prompt for tasks without their own; None for no prefix.
        merged_task: the task whose adapter is merged into the weights; None with adapters, and for
            a backbone without a task.
        tokenizer: path of tokenizer.json.
        card: the description of the model that clients and engines use.
    """

    folder: Path
    backbone: Backbone
    weights: Mapping[str, tuple[Path, str]]
    adapters: tuple[Adapter, ...]
    prompts: Mapping[str, str]
    default_prompt: str | None
    merged_task: MergedTask | None
    tokenizer: Path
    card: ModelCard


def read_checkpoint(
    folder: Path, name: str, revision: str | None = None, task_name: str | None = None
) -> Checkpoint:
    """Read and check a checkpoint folder in the jina-embeddings-v5 layout, or a plain backbone.

    Code from the folder is never run, and pickles are never loaded.

    Args:
        folder: contains config.json, safetensors, tokenizer.json, and optionally ``adapters/``.
        name: model name in the API.
        revision: commit on the Hugging Face Hub that the folder was downloaded from.
        task_name: task of a checkpoint without adapters; None to derive it from its name and its
            prompts, see ``find_merged_task``.

    Raises:
        CheckpointError: a file is missing or damaged or may not be read, or the files ask for
            something that is not implemented.
    """
    config_file = folder / "config.json"
    config = read_json(config_file)
    shapes, weights = _weights(folder)
    names = repository_names(folder, name)
    backbone = _backbone(folder, config, shapes, names)
    pooled_tokens = check_pooling(folder, config.get("model_type"))
    task_names = config.get("task_names") or []
    if not isinstance(task_names, list):
        raise CheckpointError(f"{config_file}: task_names must be a list.")
    task_names = [str(task) for task in task_names]
    if len(set(task_names)) != len(task_names):
        raise CheckpointError(f"{config_file}: task_names contains duplicates: {task_names}.")
    adapters = read_adapters(folder, backbone, task_names)
    prompts, default_prompt = _prompts(
        folder, required=any(not adapter.prompts for adapter in adapters)
    )
    merged_task = None
    if not adapters:
        merged_task = find_merged_task(
            names, prompts, default_prompt, task_name, str(folder / PROMPTS_FILE)
        )
    elif task_name is not None:
        raise CheckpointError(
            f"--task-name {task_name[:80]} names the task of a checkpoint without adapters, but "
            f"{name} has the adapters {', '.join(adapter.name for adapter in adapters)}: leave it "
            "out."
        )
    tokenizer = folder / "tokenizer.json"
    require_file(tokenizer)
    return Checkpoint(
        folder=folder,
        backbone=backbone,
        weights=weights,
        adapters=adapters,
        prompts=prompts,
        default_prompt=default_prompt,
        merged_task=merged_task,
        tokenizer=tokenizer,
        card=ModelCard(
            name=name,
            revision=revision,
            architecture=backbone.architecture,
            dimension=backbone.hidden,
            max_tokens=_max_tokens(folder, backbone, pooled_tokens),
            vocabulary=backbone.vocabulary,
            matryoshka=matryoshka_dimensions(config, backbone.hidden, str(config_file)),
            adapters=tuple(adapter.name for adapter in adapters),
            parameters=backbone.parameters,
        ),
    )


def _backbone(
    folder: Path,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    names: Sequence[str],
) -> Backbone:
    """Return the backbone that config.json describes, if the weights are exactly its tensors."""
    stated = states_omni(config)
    if stated is not None:
        raise omni_error(names, f"config.json in {folder} has {stated}")
    try:
        backbone = read_backbone(config, frozenset(shapes), str(folder / "config.json"))
        _check_tensors(shapes, backbone, folder)
    except CheckpointError as error:
        if not is_omni_name(names):
            raise
        raise omni_error(names, str(error)) from None
    return backbone


def _weights(folder: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[Path, str]]]:
    shapes: dict[str, tuple[int, ...]] = {}
    sources: dict[str, tuple[Path, str]] = {}
    for file in weight_files(folder):
        for key, shape in tensor_shapes(file).items():
            name = key.removeprefix("model.")
            if name.startswith("lm_head.") or name.endswith("rotary_emb.inv_freq"):
                continue  # the language-model head and derived buffers: unused for embeddings
            shapes[name] = shape
            sources[name] = (file, key)
    return shapes, sources


def _check_tensors(shapes: Mapping[str, tuple[int, ...]], backbone: Backbone, folder: Path) -> None:
    if backbone.layers > len(shapes):  # a huge number must not fill the memory with names
        raise CheckpointError(
            f"config.json in {folder} implies {backbone.layers} layers, the weights have only "
            f"{len(shapes)} tensors: config and weights belong to different models."
        )
    expected = dict(backbone.tensors())
    for name, shape in expected.items():
        if name not in shapes:
            raise CheckpointError(
                f"The weights in {folder} lack {name!r}, which config.json implies: the file is "
                "incomplete or belongs to another model."
            )
        if shapes[name] != shape:
            raise CheckpointError(
                f"The weights in {folder} have {name!r} as {list(shapes[name])}, config.json "
                f"implies {list(shape)}: config and weights belong to different models."
            )
    unknown = sorted(set(shapes) - set(expected))
    if unknown:
        raise CheckpointError(
            f"The weights in {folder} contain {len(unknown)} tensors that this backbone does not "
            f"use (the first is {unknown[0]!r}): they belong to another architecture, and the "
            "vectors would be wrong."
        )


def _prompts(folder: Path, *, required: bool) -> tuple[dict[str, str], str | None]:
    file = folder / PROMPTS_FILE
    if not is_file(file) and not required:
        return {}, None
    prompts, default = read_prompts(file)
    if required and not {"query", "document"} <= set(prompts):
        raise CheckpointError(
            f"{file} lacks the prompts 'query' and 'document': without them the adapters give "
            "wrong vectors."
        )
    return prompts, default


def _max_tokens(folder: Path, backbone: Backbone, pooled_tokens: int | None) -> int:
    """Return the longest text in tokens, which is the smallest limit that a file states."""
    limit = min(pooled_tokens or backbone.max_positions, backbone.max_positions)
    file = folder / "tokenizer_config.json"
    stated = read_json(file).get("model_max_length") if is_file(file) else None
    # transformers writes 1e30 for "no limit".
    if not isinstance(stated, int | float) or not math.isfinite(stated) or stated < 1:
        return limit
    return min(int(stated), limit)
