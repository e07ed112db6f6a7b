"""The LoRA adapters of a checkpoint; every tensor key is checked before any weight is loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from taskvec.checkpoint.backbone import Backbone
from taskvec.checkpoint.files import (
    PROMPTS_FILE,
    is_file,
    is_folder,
    list_folder,
    read_json,
    read_prompts,
    tensor_shapes,
)
from taskvec.errors import CheckpointError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<prefix>(?:model\.)?)layers\.(?P<layer>\d+)\."
    r"(?P<module>(?:self_attn|mlp)\.\w+)\.lora_(?P<side>[AB])(?:\.default)?\.weight"
)
_UNSUPPORTED_OPTIONS = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "layer_replication",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
"""Fields of adapter_config.json that change the forward pass and are not implemented."""

_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights with which the backbone's weights stay as they are. Others, such as
PiSSA, OLoRA and CorDA, change them when an adapter is made, and again when peft loads it."""


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
    root_config = folder / "adapter_config.json"
    if is_file(root_config):
        raise CheckpointError(
            f"{root_config} is of an adapter for the whole model, which taskvec does not apply: "
            "merge it into the weights, or move it and its weights to a folder of its own under "
            f"{adapters_folder}."
        )
    folders = [path for path in list_folder(adapters_folder) if path.name[0] != "."]
    found = {path.name: path for path in folders if is_folder(path)}
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
    if not is_file(weights) and is_file(folder / "adapter_model.bin"):
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
    prefix, keys = _match_keys(tensor_shapes(weights), weights, rank, backbone)
    _check_complete(
        set(keys), _targets(config, config_file, backbone, prefix), weights, config_file
    )
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    prompts_file = folder / PROMPTS_FILE
    prompts = read_prompts(prompts_file)[0] if is_file(prompts_file) else {}
    return Adapter(name=name, weights=weights, rank=rank, scale=scale, keys=keys, prompts=prompts)


def _match_keys(
    shapes: Mapping[str, tuple[int, ...]], file: Path, rank: int, backbone: Backbone
) -> tuple[str, dict[tuple[int, str], tuple[str, str]]]:
    """Return what precedes ``layers.`` in the names of the base model's modules, and the keys."""
    sides: dict[tuple[int, str], dict[str, str]] = {}
    prefixes: set[str] = set()
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
        prefixes.add(match["prefix"])
    if not sides:
        raise CheckpointError(f"{file} contains no adapter weights.")
    if len(prefixes) > 1:
        raise CheckpointError(
            f"{file} has tensors with and without the prefix 'model.': it is of two models."
        )
    for (layer, module), pair in sides.items():
        if len(pair) != 2:
            raise CheckpointError(
                f"{file} has only one of lora_A and lora_B for layers.{layer}.{module}."
            )
    return prefixes.pop(), {target: (pair["A"], pair["B"]) for target, pair in sides.items()}


def _check_complete(
    found: set[tuple[int, str]], targets: set[tuple[int, str]], weights: Path, config_file: Path
) -> None:
    """Compare the weights with the targets: peft sets missing ones to zero, and ignores others."""
    missing = sorted(targets - found)
    if missing:
        raise CheckpointError(
            f"{weights} lacks the weights of {len(missing)} of {len(targets)} linear layers that "
            f"its adapter_config.json targets, such as layers.{missing[0][0]}.{missing[0][1]}: the "
            "adapter is incomplete; copy or download it again."
        )
    surplus = sorted(found - targets)
    if surplus:
        raise CheckpointError(
            f"{weights} has weights for layers.{surplus[0][0]}.{surplus[0][1]}, which "
            f"{config_file} does not target: config and weights belong to different adapters."
        )


def _targets(
    config: Mapping[str, Any], file: Path, backbone: Backbone, prefix: str
) -> set[tuple[int, str]]:
    """Return the linear layers that peft would make factors for: (layer, module).

    Args:
        config: adapter_config.json.
        file: its path.
        backbone: the backbone.
        prefix: what precedes ``layers.`` in the names of the base model's modules.

    Raises:
        CheckpointError: a field has a wrong type, or targets none of the linear layers.
    """
    selection = _Selection.of(config, file)
    names = {
        (layer, module): f"{prefix}layers.{layer}.{module}"
        for layer in range(backbone.layers)
        for module in backbone.projections
    }
    for target in selection.listed:
        if not any(_is_named(name, [target]) for name in names.values()):
            raise CheckpointError(
                f"{file} targets {target!r}, which matches none of the linear layers of this "
                "backbone."
            )
    targets = {key for key, name in names.items() if selection.has(name)}
    if not targets:
        raise CheckpointError(f"{file} targets none of the linear layers of this backbone.")
    return targets


@dataclass(frozen=True, slots=True)
class _Selection:
    """Which modules of a model an adapter is for, by the rules of peft 0.21.

    Attributes:
        listed: names, or ends of names after a dot; empty if there is a pattern.
        pattern: regular expression for whole names; None if there is a list.
        excluded: as ``listed``, or a pattern.
        layers: numbers of layers; None for all.
        layer_lists: names of the lists whose numbers count; empty for the first number.
    """

    listed: tuple[str, ...]
    pattern: re.Pattern[str] | None
    excluded: tuple[str, ...] | re.Pattern[str]
    layers: frozenset[int] | None
    layer_lists: tuple[re.Pattern[str], ...]

    @classmethod
    def of(cls, config: Mapping[str, Any], file: Path) -> Self:
        """Read the fields of adapter_config.json.

        Raises:
            CheckpointError: a field has a wrong type, or is no regular expression.
        """
        targets = _names_or_pattern(config.get("target_modules"), file, "target_modules")
        if isinstance(targets, re.Pattern) and targets.pattern.lower() == "all-linear":
            targets = re.compile(".*")
        if not targets:
            raise CheckpointError(f"{file} has no target_modules.")
        excluded = _names_or_pattern(config.get("exclude_modules") or [], file, "exclude_modules")
        layers = config.get("layers_to_transform")
        if type(layers) is int:
            layers = [layers]
        if layers is not None and not (
            isinstance(layers, list) and all(type(layer) is int for layer in layers)
        ):
            raise CheckpointError(f"{file}: layers_to_transform must be a list of integers.")
        lists = config.get("layers_pattern") or []
        lists = [lists] if isinstance(lists, str) else lists
        if not isinstance(lists, list) or not all(isinstance(name, str) for name in lists):
            raise CheckpointError(f"{file}: layers_pattern must be a list of strings.")
        if isinstance(targets, re.Pattern) and (layers is not None or lists):
            raise CheckpointError(
                f"{file} sets layers_to_transform or layers_pattern beside a regular expression in "
                "target_modules, which peft does not allow."
            )
        return cls(
            listed=() if isinstance(targets, re.Pattern) else targets,
            pattern=targets if isinstance(targets, re.Pattern) else None,
            excluded=excluded,
            layers=frozenset(layers) if layers else None,
            layer_lists=tuple(
                _compiled(rf"(?:^|.*?\.){name}\.(?P<layer>\d+)\.", file, "layers_pattern")
                for name in lists
            ),
        )

    def has(self, name: str) -> bool:
        """Return whether the adapter is for the module with a name."""
        if isinstance(self.excluded, re.Pattern):
            if self.excluded.fullmatch(name):
                return False
        elif _is_named(name, self.excluded):
            return False
        if self.pattern is not None:
            return self.pattern.fullmatch(name) is not None
        if name in self.listed:
            return True
        return _is_named(name, self.listed) and (
            self.layers is None or self._layer(name) in self.layers
        )

    def _layer(self, name: str) -> int | None:
        patterns = self.layer_lists or (_FIRST_NUMBER,)
        match = next(filter(None, (pattern.match(name) for pattern in patterns)), None)
        return int(match["layer"]) if match else None


_FIRST_NUMBER = re.compile(r".*?\.[^.]*\.(?P<layer>\d+)\.")


def _is_named(name: str, ends: Sequence[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _names_or_pattern(value: object, file: Path, field: str) -> tuple[str, ...] | re.Pattern[str]:
    if isinstance(value, str) and value:
        return _compiled(value, file, field)
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return tuple(value)
    raise CheckpointError(f"{file}: {field} must be a list of names or a regular expression.")


def _compiled(pattern: str, file: Path, field: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        raise CheckpointError(
            f"{file}: {field} is not a regular expression: {pattern!r}."
        ) from None


def _reject_unimplemented(config: Mapping[str, Any], file: Path) -> None:
    peft_type = config.get("peft_type")
    if peft_type != "LORA":
        raise CheckpointError(f"{file} has the PEFT type {peft_type!r}: only LORA is implemented.")
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{file} trains biases ({config['bias']!r}): not implemented.")
    initialisation = config.get("init_lora_weights")
    if initialisation not in _INITIALISATIONS:
        raise CheckpointError(
            f"{file} sets init_lora_weights to {initialisation!r}, which also changes the weights "
            "of the backbone: convert it to a plain LoRA adapter with peft, or merge it."
        )
    for key in _UNSUPPORTED_OPTIONS:
        if config.get(key):
            raise CheckpointError(
                f"{file} sets {key}, which taskvec does not implement: retrain or merge it."
            )
