"""The LoRA adapters of a checkpoint; every tensor key is checked before any weight is loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from taskvec.checkpoint.backbone import Backbone
from taskvec.checkpoint.files import PROMPTS_FILE, read_json, read_prompts, tensor_shapes
from taskvec.errors import CheckpointError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_KEY = re.compile(
    r"(?:base_model\.model\.)?(?:model\.)?layers\.(?P<layer>\d+)\."
    r"(?P<module>(?:self_attn|mlp)\.\w+)\.lora_(?P<side>[AB])(?:\.default)?\.weight"
)
_UNSUPPORTED_OPTIONS = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "layers_to_transform",
    "layer_replication",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "target_parameters",
    "trainable_token_indices",
    "exclude_modules",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
)
"""Fields of adapter_config.json that change the forward pass and are not implemented."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """One LoRA adapter: ``W + scale * B @ A`` for each linear layer that it has weights for.

    Hu et al., arXiv 2106.09685; rsLoRA: Kalajdzievski, arXiv 2312.03732.

    Attributes:
        name: name of the adapter folder.
        weights: the safetensors file.
        rank: r, the number of rows of A.
        scale: ``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA.
        keys: (layer, module) -> (key of A [r, in], key of B [out, r]).
        prompts: prompt name -> prefix; empty if the adapter uses the prompts of the checkpoint.
    """

    name: str
    weights: Path
    rank: int
    scale: float
    keys: Mapping[tuple[int, str], tuple[str, str]]
    prompts: Mapping[str, str] = field(default_factory=dict)


def read_adapters(folder: Path, backbone: Backbone, expected: Sequence[str]) -> tuple[Adapter, ...]:
    """Read every adapter under ``folder/adapters``: first in the config's order, then by name.

    Args:
        folder: the checkpoint.
        backbone: the backbone that the adapters must fit.
        expected: adapter names listed in config.json.

    Raises:
        CheckpointError: an adapter is missing, damaged, belongs to another model, or needs a
            feature that is not implemented.
    """
    adapters_folder = folder / "adapters"
    folders = sorted(adapters_folder.iterdir()) if adapters_folder.is_dir() else []
    found = {path.name: path for path in folders if path.is_dir() and path.name[0] != "."}
    missing = [name for name in expected if name not in found]
    if missing:
        raise CheckpointError(
            f"config.json lists the adapters {', '.join(missing)}, but {adapters_folder} has no "
            "such folder: download the checkpoint again with its adapters."
        )
    names = [*expected, *(name for name in found if name not in expected)]
    return tuple(_read_adapter(found[name], name, backbone) for name in names)


def _read_adapter(folder: Path, name: str, backbone: Backbone) -> Adapter:
    if not _NAME.fullmatch(name):
        raise CheckpointError(
            f"The name of the adapter folder {folder} cannot be part of a model name: use only "
            "letters, digits, '.', '_' and '-'."
        )
    config_file = folder / "adapter_config.json"
    config = read_json(config_file)
    _reject_unimplemented(config, config_file)
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file() and (folder / "adapter_model.bin").is_file():
        raise CheckpointError(
            f"{folder} has only pickled weights, which are never loaded: convert them to "
            "adapter_model.safetensors."
        )
    try:
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise CheckpointError(f"{config_file} has no valid r and lora_alpha.") from None
    if rank < 1 or not math.isfinite(alpha):
        raise CheckpointError(f"{config_file} has no valid r and lora_alpha: {rank} and {alpha}.")
    keys = _match_keys(tensor_shapes(weights), weights, rank, backbone)
    targets = _target_modules(config, config_file, backbone)
    missing = sorted(targets - {module for _, module in keys})
    if missing:
        raise CheckpointError(
            f"{weights} has no weights for {', '.join(missing)}, which its adapter_config.json "
            "targets: the adapter is incomplete."
        )
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    prompts_file = folder / PROMPTS_FILE
    prompts = read_prompts(prompts_file)[0] if prompts_file.is_file() else {}
    return Adapter(name=name, weights=weights, rank=rank, scale=scale, keys=keys, prompts=prompts)


def _match_keys(
    shapes: Mapping[str, tuple[int, ...]], file: Path, rank: int, backbone: Backbone
) -> dict[tuple[int, str], tuple[str, str]]:
    sides: dict[tuple[int, str], dict[str, str]] = {}
    for key, shape in shapes.items():
        match = _KEY.fullmatch(key)
        if match is None or match["module"] not in backbone.projections:
            raise CheckpointError(
                f"{file} has the tensor {key!r}, which matches none of the linear layers of the "
                "backbone: the adapter belongs to another model."
            )
        layer, module = int(match["layer"]), match["module"]
        out, into = backbone.projections[module]
        expected = (rank, into) if match["side"] == "A" else (out, rank)
        if shape != expected or layer >= backbone.layers:
            raise CheckpointError(
                f"{file}: {key!r} has shape {list(shape)}, the backbone needs {list(expected)} in "
                f"{backbone.layers} layers: the adapter belongs to another model."
            )
        sides.setdefault((layer, module), {})[match["side"]] = key
    if not sides:
        raise CheckpointError(f"{file} contains no adapter weights.")
    for (layer, module), pair in sides.items():
        if len(pair) != 2:
            raise CheckpointError(
                f"{file} has only one of lora_A and lora_B for layers.{layer}.{module}."
            )
    return {target: (pair["A"], pair["B"]) for target, pair in sides.items()}


def _target_modules(config: Mapping[str, Any], file: Path, backbone: Backbone) -> set[str]:
    targets = config.get("target_modules")
    if not isinstance(targets, list):
        # A regular expression or "all-linear": only the tensors show which modules it matched.
        return set()
    modules = set()
    for target in targets:
        matches = {name for name in backbone.projections if name.endswith(str(target))}
        if not matches:
            raise CheckpointError(
                f"{file} targets {target!r}, which matches none of the linear layers of this "
                "backbone."
            )
        modules |= matches
    return modules


def _reject_unimplemented(config: Mapping[str, Any], file: Path) -> None:
    peft_type = config.get("peft_type")
    if peft_type != "LORA":
        raise CheckpointError(f"{file} has the PEFT type {peft_type!r}: only LORA is implemented.")
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{file} trains biases ({config['bias']!r}): not implemented.")
    for key in _UNSUPPORTED_OPTIONS:
        if config.get(key):
            raise CheckpointError(
                f"{file} sets {key}, which taskvec does not implement: retrain or merge it."
            )
