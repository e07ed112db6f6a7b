"""The LoRA adapters beside a backbone, checked key by key before anything is loaded."""

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
_REFUSED = (
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


@dataclass(frozen=True, slots=True)
class Adapter:
    """One LoRA adapter: ``W + scale * B @ A`` for each linear layer that it has weights for.

    Attributes:
        weights: the safetensors file.
        scale: ``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA.
        keys: (layer, module) -> (key of A [r, in], key of B [out, r]).
        prompts: the adapter's own, by name; empty where it uses the checkpoint's.
    """

    name: str
    weights: Path
    rank: int
    scale: float
    keys: Mapping[tuple[int, str], tuple[str, str]]
    prompts: Mapping[str, str] = field(default_factory=dict)


def read_adapters(folder: Path, backbone: Backbone, expected: Sequence[str]) -> tuple[Adapter, ...]:
    """Every adapter under ``folder/adapters``, in the config's order, then by name.

    Args:
        folder: the checkpoint.
        backbone: the backbone whose layers the adapters must fit.
        expected: adapter names that config.json promises.

    Raises:
        CheckpointError: an adapter is missing, damaged, of another width, or of a kind we lack.
    """
    home = folder / "adapters"
    folders = sorted(home.iterdir()) if home.is_dir() else []
    found = {path.name: path for path in folders if path.is_dir() and path.name[0] != "."}
    missing = [name for name in expected if name not in found]
    if missing:
        raise CheckpointError(
            f"config.json promises the adapters {', '.join(missing)}, but {home} has no such "
            "folder: download the checkpoint again with its adapters."
        )
    names = [*expected, *(name for name in found if name not in expected)]
    return tuple(_read_adapter(found[name], name, backbone) for name in names)


def _read_adapter(folder: Path, name: str, backbone: Backbone) -> Adapter:
    if not _NAME.fullmatch(name):
        raise CheckpointError(
            f"The adapter folder {folder} has a name that cannot stand in a model name: use "
            "letters, digits, '.', '_' and '-'."
        )
    config_file = folder / "adapter_config.json"
    config = read_json(config_file)
    _refuse_unimplemented(config, config_file)
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
    wanted = _wanted_modules(config, config_file, backbone)
    absent = sorted(wanted - {module for _, module in keys})
    if absent:
        raise CheckpointError(
            f"{weights} has no weights for {', '.join(absent)}, which its adapter_config.json "
            "targets: the adapter is incomplete."
        )
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    own = folder / PROMPTS_FILE
    prompts = read_prompts(own)[0] if own.is_file() else {}
    return Adapter(name=name, weights=weights, rank=rank, scale=scale, keys=keys, prompts=prompts)


def _match_keys(
    shapes: Mapping[str, tuple[int, ...]], file: Path, rank: int, backbone: Backbone
) -> dict[tuple[int, str], tuple[str, str]]:
    sides: dict[tuple[int, str], dict[str, str]] = {}
    for key, shape in shapes.items():
        match = _KEY.fullmatch(key)
        if match is None or match["module"] not in backbone.projections:
            raise CheckpointError(
                f"{file} has the tensor {key!r}, which fits no linear layer of the backbone: it "
                "would be ignored silently, so it is refused."
            )
        layer, module = int(match["layer"]), match["module"]
        out, into = backbone.projections[module]
        fits = (rank, into) if match["side"] == "A" else (out, rank)
        if shape != fits or layer >= backbone.layers:
            raise CheckpointError(
                f"{file}: {key!r} has shape {list(shape)}, the backbone needs {list(fits)} in "
                f"{backbone.layers} layers: the adapter belongs to another model."
            )
        sides.setdefault((layer, module), {})[match["side"]] = key
    if not sides:
        raise CheckpointError(f"{file} holds no adapter weights.")
    for place, pair in sides.items():
        if len(pair) != 2:
            raise CheckpointError(f"{file} has only one of lora_A and lora_B for layer {place}.")
    return {place: (pair["A"], pair["B"]) for place, pair in sides.items()}


def _wanted_modules(config: Mapping[str, Any], file: Path, backbone: Backbone) -> set[str]:
    targets = config.get("target_modules")
    if not isinstance(targets, list):
        # A regular expression or "all-linear": the tensors themselves say what it meant.
        return set()
    wanted = set()
    for target in targets:
        matches = {name for name in backbone.projections if name.endswith(str(target))}
        if not matches:
            raise CheckpointError(
                f"{file} targets {target!r}, which is no linear layer of this backbone."
            )
        wanted |= matches
    return wanted


def _refuse_unimplemented(config: Mapping[str, Any], file: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{file} is of PEFT type {kind!r}: only LORA is implemented.")
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{file} trains biases ({config['bias']!r}): not implemented.")
    for key in _REFUSED:
        if config.get(key):
            raise CheckpointError(
                f"{file} sets {key}, which taskvec does not implement: retrain or merge it."
            )
