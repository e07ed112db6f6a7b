"""The self-test of every start rejects adapters without effect, copies and NaN."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import DEFAULT_VOCABULARY
from synthetic import ADAPTERS, TINY_NANO, TINY_SMALL, write_checkpoint
from taskvec.checkpoint.checkpoint import read_checkpoint
from taskvec.engines.packed.adapter_check import check_adapters
from taskvec.engines.packed.transformer import Transformer
from taskvec.engines.packed.weights import load_transformer
from taskvec.errors import CheckpointError

Change = Callable[[str, torch.Tensor], torch.Tensor]

modes = pytest.mark.parametrize("merge", [True, False], ids=["merged", "low-rank"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(params=["small", "nano"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny checkpoint of each architecture."""
    shape = {"small": TINY_SMALL, "nano": TINY_NANO}[request.param]
    return write_checkpoint(tmp_path / request.param, replace(shape, vocabulary=DEFAULT_VOCABULARY))


def load(folder: Path, *, merge: bool, dtype: torch.dtype = torch.float32) -> Transformer:
    checkpoint = read_checkpoint(folder, "tiny")
    return load_transformer(checkpoint, device=torch.device("cpu"), dtype=dtype, merge=merge)


def weights(folder: Path, adapter: str) -> Path:
    return folder / "adapters" / adapter / "adapter_model.safetensors"


def rewrite(file: Path, change: Change) -> None:
    """Change tensors of a safetensors file by name."""
    tensors = load_file(file)
    save_file({name: change(name, tensor) for name, tensor in tensors.items()}, file)


@modes
@dtypes
def test_adapters_that_differ_pass(folder: Path, merge: bool, dtype: torch.dtype) -> None:
    """Four different adapters pass in every mode and dtype."""
    check_adapters(load(folder, merge=merge, dtype=dtype), ADAPTERS)


def test_a_bare_backbone_passes(folder: Path) -> None:
    """A checkpoint without adapters passes."""
    check_adapters(load(folder, merge=False), [])


@modes
@dtypes
@pytest.mark.parametrize("adapter", ["retrieval", "classification"])
def test_an_adapter_without_effect_is_rejected_by_name(
    folder: Path, merge: bool, dtype: torch.dtype, adapter: str
) -> None:
    """An adapter with lora_B at zero, as PEFT initialises it, is rejected."""
    rewrite(
        weights(folder, adapter),
        lambda name, tensor: torch.zeros_like(tensor) if "lora_B" in name else tensor,
    )
    with pytest.raises(CheckpointError, match=f"'{adapter}'.*same.*backbone"):
        check_adapters(load(folder, merge=merge, dtype=dtype), ADAPTERS)


@modes
@dtypes
def test_two_equal_adapters_are_rejected_by_name(
    folder: Path, merge: bool, dtype: torch.dtype
) -> None:
    """A copy of an adapter is rejected with both names."""
    copied = weights(folder, "text-matching").read_bytes()
    weights(folder, "classification").write_bytes(copied)
    with pytest.raises(CheckpointError, match=r"'classification'.*same.*'text-matching'"):
        check_adapters(load(folder, merge=merge, dtype=dtype), ADAPTERS)


def test_an_adapter_too_small_for_the_dtype_is_rejected(folder: Path) -> None:
    """An adapter that is lost when it is merged in bfloat16 is rejected."""
    rewrite(
        weights(folder, "clustering"),
        lambda name, tensor: tensor * 1e-4 if "lora_B" in name else tensor,
    )
    check_adapters(load(folder, merge=True), ADAPTERS)
    rewrite(
        weights(folder, "clustering"),
        lambda name, tensor: tensor * 1e-4 if "lora_B" in name else tensor,
    )
    with pytest.raises(CheckpointError, match=r"'clustering'.*lost in torch\.bfloat16"):
        check_adapters(load(folder, merge=True, dtype=torch.bfloat16), ADAPTERS)


@modes
def test_an_adapter_that_gives_nan_is_rejected_by_name(folder: Path, merge: bool) -> None:
    """An adapter with NaN weights is rejected."""

    def damage(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(math.nan) if "layers.1.mlp.up_proj.lora_B" in name else tensor

    rewrite(weights(folder, "clustering"), damage)
    with pytest.raises(CheckpointError, match=r"'clustering'.*not finite"):
        check_adapters(load(folder, merge=merge), ADAPTERS)


@modes
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_backbone_that_is_not_finite_is_rejected(folder: Path, merge: bool, value: float) -> None:
    """A backbone with NaN or infinite weights is rejected."""

    def damage(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(value) if name == "layers.0.mlp.down_proj.weight" else tensor

    rewrite(folder / "model.safetensors", damage)
    with pytest.raises(CheckpointError, match=r"backbone.*not finite"):
        check_adapters(load(folder, merge=merge), ADAPTERS)
