"""Which linear layers an adapter must have weights for: those that peft makes factors for."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from synthetic import TINY_SMALL, write_adapter, write_checkpoint
from taskvec.checkpoint.adapters import Adapter
from taskvec.checkpoint.checkpoint import read_checkpoint
from taskvec.errors import CheckpointError

SHAPE = replace(
    TINY_SMALL, vocabulary=64, hidden=16, layers=3, heads=2, kv_heads=1, head_dim=8,
    intermediate=24, rank=4,
)  # fmt: skip
ALL = {
    (layer, module)
    for layer in range(SHAPE.layers)
    for module in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )
}  # fmt: skip

FORMS: dict[str, dict[str, Any]] = {
    "list": {"target_modules": ["q_proj", "v_proj"]},
    "ends of names": {"target_modules": ["self_attn.q_proj", "mlp.up_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "All-Linear": {"target_modules": "All-Linear"},
    "pattern": {"target_modules": r".*layers\.[12]\.(self_attn\.[qk]|mlp\.down)_proj"},
    "one module": {"target_modules": ["layers.1.mlp.up_proj"]},
    "one module and others": {"target_modules": ["layers.1.mlp.up_proj", "o_proj"]},
    "excluded list": {"target_modules": "all-linear", "exclude_modules": ["q_proj", "mlp.up_proj"]},
    "excluded pattern": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*\.1\..*"},
    "one layer": {
        "target_modules": ["q_proj"],
        "layers_to_transform": 1,
        "layers_pattern": "layers",
    },
    "the first layer": {
        "target_modules": ["q_proj"],
        "layers_to_transform": 0,
        "layers_pattern": "layers",
    },
    "layers": {
        "target_modules": ["up_proj"],
        "layers_to_transform": [0, 2],
        "layers_pattern": ["h", "layers"],
    },
    "no layers": {"target_modules": ["up_proj"], "layers_to_transform": []},
}
WITH_HEAD: dict[str, dict[str, Any]] = {
    "list": FORMS["list"],
    "all-linear": FORMS["all-linear"],
    "pattern": {"target_modules": r"model\.layers\.\d+\.mlp\.(gate|up)_proj"},
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [2]},
    "full names": {"target_modules": ["model.layers.0.self_attn.q_proj"]},
}
"""With a language model, whose modules have names that begin with ``model.``."""

WRONG: dict[str, dict[str, Any]] = {
    "null": {"target_modules": None},
    "number": {"target_modules": 7},
    "empty list": {"target_modules": []},
    "empty string": {"target_modules": ""},
    "list of numbers": {"target_modules": [1]},
    "no pattern": {"target_modules": "("},
    "pattern of nothing": {"target_modules": "q_proj"},
    "ends in the middle of a word": {"target_modules": ["proj"]},
    "everything excluded": {"exclude_modules": ".*"},
    "excluded number": {"exclude_modules": 7},
    "excluded no pattern": {"exclude_modules": "["},
    "layers beside a pattern": {"target_modules": ".*q_proj", "layers_to_transform": [1]},
    "layers as words": {"layers_to_transform": ["1"]},
    "layers under another name": {"layers_to_transform": [1], "layers_pattern": "h"},
    "layers without a name": {"layers_to_transform": [1]},
    "a layer that does not exist": {"layers_to_transform": [7], "layers_pattern": "layers"},
    "no layers pattern": {"layers_to_transform": [1], "layers_pattern": "("},
    "layers pattern of another type": {"layers_to_transform": [1], "layers_pattern": 7},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_targets_are_those_of_peft(tmp_path: Path, form: str) -> None:
    """For each form of config, exactly the layers are required that peft makes factors for."""
    wanted = save_with_peft(tmp_path, Qwen3Model, FORMS[form])
    assert set(read(tmp_path).keys) == wanted
    restate(tmp_path, **FORMS[form])  # peft has replaced some forms by lists
    assert set(read(tmp_path).keys) == wanted


@pytest.mark.parametrize("form", WITH_HEAD)
def test_targets_of_a_language_model_are_those_of_peft(tmp_path: Path, form: str) -> None:
    """Patterns and names are matched with the names of the model that the adapter was made for."""
    wanted = save_with_peft(tmp_path, Qwen3ForCausalLM, WITH_HEAD[form])
    restate(tmp_path, **WITH_HEAD[form])
    assert set(read(tmp_path).keys) == wanted


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("at", [0, -1])
def test_each_target_is_required(tmp_path: Path, form: str, at: int) -> None:
    """Without the weights of one targeted layer, the adapter is rejected and the layer is named."""
    wanted = sorted(save_with_peft(tmp_path, Qwen3Model, FORMS[form]))
    layer, module = wanted[at]
    keep(tmp_path, lambda key: f"layers.{layer}.{module}." not in key)
    if len(wanted) == 1:
        with pytest.raises(CheckpointError, match="no adapter weights"):
            read(tmp_path)
        return
    with pytest.raises(CheckpointError, match=re.escape(f"1 of {len(wanted)}")) as refused:
        read(tmp_path)
    assert f"layers.{layer}.{module}" in str(refused.value)
    assert "adapter_model.safetensors" in str(refused.value)


def test_a_layer_without_weights_is_rejected(tmp_path: Path) -> None:
    """An adapter without any key of one layer, as after a cut conversion, is rejected."""
    save_with_peft(tmp_path, Qwen3Model, {"target_modules": "all-linear"})
    keep(tmp_path, lambda key: "layers.2." not in key)
    with pytest.raises(CheckpointError, match=r"7 of 21 .* such as layers\.2\."):
        read(tmp_path)


def test_weights_that_are_not_targeted_are_rejected(tmp_path: Path) -> None:
    """Weights are ignored by peft that the config does not target, so that vectors would differ."""
    save_with_peft(tmp_path, Qwen3Model, {"target_modules": "all-linear"})
    restate(tmp_path, target_modules=["q_proj"])
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.down_proj, which .* not target"):
        read(tmp_path)


@pytest.mark.parametrize("form", WRONG)
def test_a_wrong_form_is_rejected(tmp_path: Path, form: str) -> None:
    """Targets of a wrong type, or that match nothing, are rejected and the file is named."""
    write_checkpoint(tmp_path, SHAPE, adapters=("code",))
    restate(tmp_path, **WRONG[form])
    with pytest.raises(CheckpointError, match=r"adapter_config\.json") as refused:
        read(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "how", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "x"]
)
def test_an_adapter_that_changes_the_backbone_is_rejected(tmp_path: Path, how: str) -> None:
    """An initialisation by which peft also changes the backbone's weights is rejected by name."""
    write_checkpoint(tmp_path, SHAPE, adapters=("code",))
    restate(tmp_path, init_lora_weights=how)
    with pytest.raises(CheckpointError, match=f"init_lora_weights to '{how}'"):
        read(tmp_path)


@pytest.mark.parametrize("how", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_other_initialisations_are_accepted(tmp_path: Path, how: object) -> None:
    """An initialisation of the adapter alone says nothing about trained weights."""
    write_checkpoint(tmp_path, SHAPE, adapters=("code",))
    restate(tmp_path, init_lora_weights=how)
    assert set(read(tmp_path).keys) == ALL


def test_tensors_of_two_models_are_rejected(tmp_path: Path) -> None:
    """Keys of a backbone and of a language model in one file have no common config."""
    write_checkpoint(tmp_path, SHAPE, adapters=("code",))
    file = tmp_path / "adapters" / "code" / "adapter_model.safetensors"
    old, new = "base_model.model.layers.1.", "base_model.model.model.layers.1."
    save_file({key.replace(old, new): tensor for key, tensor in load_file(file).items()}, file)
    with pytest.raises(CheckpointError, match="two models"):
        read(tmp_path)


def test_an_adapter_beside_the_weights_is_rejected(tmp_path: Path) -> None:
    """An adapter in the checkpoint's own folder, which transformers applies, is not ignored."""
    write_checkpoint(tmp_path, SHAPE, jina=False, adapters=())
    write_adapter(tmp_path, SHAPE, torch.Generator().manual_seed(1))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json .* merge it"):
        read_checkpoint(tmp_path, "m")


def save_with_peft(
    folder: Path, kind: type[Qwen3Model | Qwen3ForCausalLM], form: dict[str, Any]
) -> set[tuple[int, str]]:
    """Write a checkpoint with one adapter that peft has made; return its targets."""
    write_checkpoint(folder, SHAPE, adapters=())
    config = Qwen3Config(
        vocab_size=SHAPE.vocabulary, hidden_size=SHAPE.hidden, num_hidden_layers=SHAPE.layers,
        num_attention_heads=SHAPE.heads, num_key_value_heads=SHAPE.kv_heads,
        head_dim=SHAPE.head_dim, intermediate_size=SHAPE.intermediate,
    )  # fmt: skip
    model = get_peft_model(kind(config), LoraConfig(r=SHAPE.rank, **form))
    model.save_pretrained(folder / "adapters" / "code")
    names = [name.removesuffix(".lora_A.default") for name, _ in model.named_modules()
             if name.endswith(".lora_A.default")]  # fmt: skip
    matches = [re.search(r"layers\.(\d+)\.(.+)", name) for name in names]
    return {(int(match[1]), match[2]) for match in matches if match}


def restate(folder: Path, **changes: Any) -> None:
    """Change values in the adapter's config."""
    file = folder / "adapters" / "code" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def keep(folder: Path, wanted: Any) -> None:
    """Delete the adapter's tensors whose keys are not wanted."""
    file = folder / "adapters" / "code" / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if wanted(key)}, file)


def read(folder: Path) -> Adapter:
    """Read the checkpoint and return its adapter."""
    (adapter,) = read_checkpoint(folder, "m").adapters
    return adapter
