"""Damaged checkpoints are rejected with a message of one line that names the file."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from synthetic import TINY_SMALL, write_checkpoint
from taskvec.checkpoint.checkpoint import read_checkpoint
from taskvec.errors import CheckpointError
from taskvec.service import build_tokenizer

SHAPE = replace(
    TINY_SMALL, vocabulary=64, hidden=16, layers=2, heads=2, kv_heads=1, head_dim=8,
    intermediate=24, rank=4,
)  # fmt: skip
ADAPTERS = ("retrieval", "clustering")
CONFIG, WEIGHTS = "config.json", "model.safetensors"
PROMPTS, LIMITS = "config_sentence_transformers.json", "tokenizer_config.json"
MODULES, POOLING, OPTIONS = "modules.json", "1_Pooling/config.json", "sentence_bert_config.json"
ADAPTER = "adapters/clustering"
ADAPTER_CONFIG = f"{ADAPTER}/adapter_config.json"
ADAPTER_WEIGHTS = f"{ADAPTER}/adapter_model.safetensors"
GATE = "layers.0.mlp.gate_proj"
GATE_A = f"base_model.model.{GATE}.lora_A.weight"

Damage = Callable[[Path], object]


def edit(file: str, **changes: Any) -> Damage:
    """Change values in a JSON file."""
    return lambda folder: write_json(folder / file, read_json(folder / file) | changes)


def cut(file: str, key: str) -> Damage:
    """Remove a key from a JSON file."""
    return lambda folder: write_json(
        folder / file, {k: v for k, v in read_json(folder / file).items() if k != key}
    )


def content(file: str, data: bytes) -> Damage:
    """Replace the contents of a file."""
    return lambda folder: (folder / file).write_bytes(data)


def half(file: str) -> Damage:
    """Keep the first half of a file, as an interrupted copy does."""
    return lambda folder: (folder / file).write_bytes(
        (folder / file).read_bytes()[: (folder / file).stat().st_size // 2]
    )


def gone(name: str) -> Damage:
    """Remove a file or a folder."""

    def remove(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def tensors(file: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Damage:
    """Rewrite a safetensors file."""
    return lambda folder: save_file(change(load_file(folder / file)), folder / file)


def renamed(old: str, new: str) -> Damage:
    """Rename a file or a folder."""
    return lambda folder: (folder / old).rename(folder / new)


def pickled(file: str, name: str) -> Damage:
    """Replace safetensors by pickled weights."""

    def swap(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).with_name(name).write_bytes(b"\x80\x04.")

    return swap


def float_of(*extents: int) -> Any:
    """Return zeros."""
    return np.zeros(extents, np.float32)


# id: damage, name in the message, word in the message
DAMAGES: dict[str, tuple[Damage, str, str]] = {
    "no config": (gone(CONFIG), CONFIG, "missing"),
    "no weights": (gone(WEIGHTS), WEIGHTS, "missing"),
    "no tokenizer": (gone("tokenizer.json"), "tokenizer.json", "missing"),
    "no prompts": (gone(PROMPTS), PROMPTS, "missing"),
    "no adapters": (gone("adapters"), CONFIG, "lists the adapters"),
    "no adapter": (gone(ADAPTER), CONFIG, "clustering"),
    "no adapter config": (gone(ADAPTER_CONFIG), ADAPTER_CONFIG, "missing"),
    "no adapter weights": (gone(ADAPTER_WEIGHTS), ADAPTER_WEIGHTS, "missing"),
    "empty weights": (content(WEIGHTS, b""), WEIGHTS, "cut short"),
    "half the weights": (half(WEIGHTS), WEIGHTS, "cut short"),
    "other bytes as weights": (content(WEIGHTS, b"<html>" * 99), WEIGHTS, "damaged"),
    "empty adapter": (content(ADAPTER_WEIGHTS, b""), ADAPTER_WEIGHTS, "cut short"),
    "half an adapter": (half(ADAPTER_WEIGHTS), ADAPTER_WEIGHTS, "cut short"),
    "a pointer instead of an adapter": (
        content(ADAPTER_WEIGHTS, b"version https://git-lfs.github.com/spec/v1\n"),
        ADAPTER_WEIGHTS,
        "damaged",
    ),
    "half a list of modules": (half(MODULES), MODULES, "JSON"),
    "an object as list of modules": (content(MODULES, b"{}"), MODULES, "list"),
    "no pooling config": (gone(POOLING), POOLING, "missing"),
    "half a pooling config": (half(POOLING), POOLING, "JSON"),
    "half of the options": (half(OPTIONS), OPTIONS, "JSON"),
    "empty config": (content(CONFIG, b""), CONFIG, "JSON"),
    "half a config": (half(CONFIG), CONFIG, "JSON"),
    "binary config": (content(CONFIG, b"\xff\xfe\x00{}"), CONFIG, "JSON"),
    "bottomless config": (content(CONFIG, b"[" * 200_000), CONFIG, "JSON"),
    "a list as config": (content(CONFIG, b"[]"), CONFIG, "object"),
    "half a prompts file": (half(PROMPTS), PROMPTS, "JSON"),
    "half a tokenizer config": (half(LIMITS), LIMITS, "JSON"),
    "half an adapter config": (half(ADAPTER_CONFIG), ADAPTER_CONFIG, "JSON"),
    "a list as adapter config": (content(ADAPTER_CONFIG, b"[]"), ADAPTER_CONFIG, "object"),
    "a number as prompt": (edit(PROMPTS, prompts={"query": 1}), PROMPTS, "strings"),
    "no document prompt": (edit(PROMPTS, prompts={"query": "Query: "}), PROMPTS, "document"),
    "unknown default prompt": (edit(PROMPTS, default_prompt_name="x"), PROMPTS, "'x'"),
    "no hidden size": (cut(CONFIG, "hidden_size"), CONFIG, "hidden_size"),
    "no rope theta": (cut(CONFIG, "rope_theta"), CONFIG, "rope_theta"),
    "words as hidden size": (edit(CONFIG, hidden_size="wide"), CONFIG, "wrong type"),
    "null layers": (edit(CONFIG, num_hidden_layers=None), CONFIG, "wrong type"),
    "a list as eps": (edit(CONFIG, rms_norm_eps=[1e-6]), CONFIG, "wrong type"),
    "a name as tasks": (edit(CONFIG, task_names="retrieval"), CONFIG, "task_names"),
    "a task twice": (edit(CONFIG, task_names=["retrieval"] * 2), CONFIG, "task_names"),
    "no heads": (edit(CONFIG, num_attention_heads=0, head_dim=None), CONFIG, "heads"),
    "heads that do not divide": (edit(CONFIG, num_key_value_heads=3), CONFIG, "heads"),
    "unknown architecture": (edit(CONFIG, model_type="bert"), CONFIG, "'bert'"),
    "no architecture": (cut(CONFIG, "model_type"), CONFIG, "architecture"),
    "a backbone of another kind": (edit(CONFIG, is_decoder=False), CONFIG, "is_decoder"),
    "rope scaling": (edit(CONFIG, rope_scaling={"rope_type": "yarn"}), CONFIG, "'yarn'"),
    "rope parameters": (edit(CONFIG, rope_parameters={"rope_type": "llama3"}), CONFIG, "'llama3'"),
    "old rope scaling": (edit(CONFIG, rope_scaling={"type": "linear"}), CONFIG, "'linear'"),
    "sliding window": (edit(CONFIG, use_sliding_window=True), CONFIG, "use_sliding_window"),
    "sliding layers": (edit(CONFIG, layer_types=["sliding_attention"]), CONFIG, "sliding"),
    "attention bias": (edit(CONFIG, attention_bias=True), CONFIG, "attention_bias"),
    "other activation": (edit(CONFIG, hidden_act="gelu"), CONFIG, "'gelu'"),
    "other hidden size": (edit(CONFIG, hidden_size=32), CONFIG, "[64, 32]"),
    "one layer more": (edit(CONFIG, num_hidden_layers=3), CONFIG, "layers.2"),
    "one layer less": (edit(CONFIG, num_hidden_layers=1), "weights", "layers.1"),
    "a tensor missing": (
        tensors(WEIGHTS, lambda t: {k: v for k, v in t.items() if k != "norm.weight"}),
        CONFIG,
        "'norm.weight'",
    ),
    "a tensor of another shape": (
        tensors(WEIGHTS, lambda t: t | {"norm.weight": float_of(8)}),
        CONFIG,
        "[8]",
    ),
    "a tensor too many": (
        tensors(WEIGHTS, lambda t: t | {"pooler.weight": float_of(8)}),
        "weights",
        "'pooler.weight'",
    ),
    "quantised weights": (
        tensors(WEIGHTS, lambda t: t | {"norm.weight": np.zeros(16, np.int8)}),
        WEIGHTS,
        "I8",
    ),
    "pickled weights": (pickled(WEIGHTS, "pytorch_model.bin"), WEIGHTS, "pickled"),
    "pickled adapter": (pickled(ADAPTER_WEIGHTS, "adapter_model.bin"), ADAPTER, "pickled"),
    "adapter of another width": (
        tensors(ADAPTER_WEIGHTS, lambda t: t | {GATE_A: float_of(4, 32)}),
        ADAPTER_WEIGHTS,
        "another model",
    ),
    "adapter of another rank": (edit(ADAPTER_CONFIG, r=8), ADAPTER_WEIGHTS, "[8, "),
    "adapter of a deeper model": (
        tensors(ADAPTER_WEIGHTS, lambda t: t | {GATE_A.replace(".0.", ".7."): float_of(4, 16)}),
        ADAPTER_WEIGHTS,
        "layers.7",
    ),
    "adapter with an unknown tensor": (
        tensors(ADAPTER_WEIGHTS, lambda t: t | {"lm_head.lora_A.weight": float_of(4, 16)}),
        ADAPTER_WEIGHTS,
        "'lm_head.lora_A.weight'",
    ),
    "adapter with lora_A alone": (
        tensors(ADAPTER_WEIGHTS, lambda t: {k: v for k, v in t.items() if "lora_A" in k}),
        ADAPTER_WEIGHTS,
        "only one of lora_A and lora_B",
    ),
    "adapter without a module it targets": (
        tensors(ADAPTER_WEIGHTS, lambda t: {k: v for k, v in t.items() if "gate" not in k}),
        ADAPTER_WEIGHTS,
        "gate_proj",
    ),
    "adapter without tensors": (tensors(ADAPTER_WEIGHTS, lambda _: {}), ADAPTER_WEIGHTS, "no"),
    "adapter with int8 tensors": (
        tensors(ADAPTER_WEIGHTS, lambda t: t | {GATE_A: np.zeros((4, 16), np.int8)}),
        ADAPTER_WEIGHTS,
        "I8",
    ),
    "adapter for other layers": (
        edit(ADAPTER_CONFIG, target_modules=["query_key_value"]),
        ADAPTER_CONFIG,
        "query_key_value",
    ),
    "adapter of no rank": (cut(ADAPTER_CONFIG, "r"), ADAPTER_CONFIG, "r and lora_alpha"),
    "adapter of no alpha": (edit(ADAPTER_CONFIG, lora_alpha=None), ADAPTER_CONFIG, "lora_alpha"),
    "other peft type": (edit(ADAPTER_CONFIG, peft_type="IA3"), ADAPTER_CONFIG, "'IA3'"),
    "DoRA": (edit(ADAPTER_CONFIG, use_dora=True), ADAPTER_CONFIG, "use_dora"),
    "bias": (edit(ADAPTER_CONFIG, bias="lora_only"), ADAPTER_CONFIG, "biases"),
    "modules to save": (edit(ADAPTER_CONFIG, modules_to_save=["x"]), ADAPTER_CONFIG, "modules_to"),
    "rank pattern": (edit(ADAPTER_CONFIG, rank_pattern={"q_proj": 2}), ADAPTER_CONFIG, "rank_p"),
    "alpha pattern": (edit(ADAPTER_CONFIG, alpha_pattern={"q": 2}), ADAPTER_CONFIG, "alpha_p"),
    "odd adapter name": (renamed(ADAPTER, "adapters/a:b"), CONFIG, "clustering"),
    "odd further adapter": (
        lambda folder: shutil.copytree(folder / ADAPTER, folder / "adapters/a b"),
        "adapters/a b",
        "name",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid checkpoint."""
    folder = write_checkpoint(tmp_path_factory.mktemp("sound") / "m", SHAPE, adapters=ADAPTERS)
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [
        {"path": path, "type": f"sentence_transformers.models.{name}"} for path, name in kinds
    ]
    (folder / MODULES).write_text(json.dumps(modules))
    (folder / POOLING).parent.mkdir()
    write_json(folder / POOLING, {"pooling_mode_lasttoken": True, "pooling_mode": "lasttoken"})
    write_json(folder / OPTIONS, {"max_seq_length": None})
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy of the valid checkpoint, to be damaged."""
    return shutil.copytree(sound, tmp_path / "checkpoint")


def test_the_undamaged_checkpoint_is_accepted(sound: Path) -> None:
    """The checkpoint that the other tests damage is accepted."""
    assert read_checkpoint(sound, "m").card.adapters == ADAPTERS


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_rejected_in_one_line(folder: Path, kind: str) -> None:
    """The message names the damaged file and the error, on one line."""
    damage, named, word = DAMAGES[kind]
    damage(folder)
    sentence = refusal(folder)
    assert named in sentence
    assert word in sentence
    assert "\n" not in sentence
    assert sentence.endswith(".")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    """The message names the missing one of several weight files."""
    folder = write_checkpoint(tmp_path, SHAPE, adapters=(), shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors is missing" in refusal(folder)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_a_shard_outside_the_folder_is_rejected(folder: Path, shard: str) -> None:
    """An index cannot refer to files outside the checkpoint folder."""
    (folder / WEIGHTS).rename(folder.parent / WEIGHTS)
    index = f"{WEIGHTS}.index.json"
    write_json(folder / index, {"weight_map": {"norm.weight": shard}})
    sentence = refusal(folder)
    assert index in sentence
    assert "outside" in sentence


def test_a_tokenizer_of_another_model_is_rejected(folder: Path) -> None:
    """A tokenizer with ids beyond the vocabulary is rejected before it is used."""
    checkpoint = read_checkpoint(folder, "m")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json has ids up to \d+, .* only 64:"):
        build_tokenizer(checkpoint, max_tokens=0, threads=1)


@pytest.mark.parametrize("data", [b"", b"{}", b'{"version": "1.0"', b"\xff"])
def test_a_damaged_tokenizer_is_rejected(folder: Path, data: bytes) -> None:
    """An invalid tokenizer.json is rejected, and the message names it."""
    (folder / "tokenizer.json").write_bytes(data)
    checkpoint = read_checkpoint(folder, "m")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read .*: copy or downl"):
        build_tokenizer(checkpoint, max_tokens=0, threads=1)


def test_a_huge_number_of_layers_is_rejected_at_once(folder: Path) -> None:
    """The number of layers is compared with the weights before names are generated."""
    edit(CONFIG, num_hidden_layers=10**12)(folder)
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from taskvec.checkpoint.checkpoint import read_checkpoint\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
        "read_checkpoint(Path(sys.argv[1]), 'm')"
    )
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.stderr.splitlines()[-1].startswith("taskvec.errors.CheckpointError: ")


VALUES = (
    None, True, False, -1, 0, 1, 7, 0.5, float("inf"), float("nan"), "", "x", "7", [], [1],
    ["x"], [{}], [None, "x"], {}, {"x": 1}, {"x": {}},
)  # fmt: skip


FURTHER_KEYS = {
    CONFIG: (
        "matryoshka_dimensions", "layer_types", "rope_scaling", "rope_parameters",
        "partial_rotary_factor", "is_causal", "use_bidirectional_attention",
    ),
    ADAPTER_CONFIG: (
        "layers_to_transform", "layers_pattern", "exclude_modules", "init_lora_weights",
    ),
    OPTIONS: (
        "max_seq_length", "do_lower_case", "modality_config", "processing_kwargs", "model_args",
    ),
}  # fmt: skip


@pytest.mark.parametrize("file", [CONFIG, PROMPTS, LIMITS, ADAPTER_CONFIG, POOLING, OPTIONS])
def test_no_value_breaks_the_reader(folder: Path, file: str) -> None:
    """With any JSON value at any key, the checkpoint is read or rejected with a CheckpointError."""
    original = read_json(folder / file)
    further = FURTHER_KEYS.get(file, ())
    broken = []
    for key in sorted({*original, *further}):
        for value in VALUES:
            write_json(folder / file, original | {key: value})
            fault = unexpected(folder)
            if fault:
                broken.append(f"{key} = {value!r}: {fault}")
    assert broken == []


@given(data=st.data())
def test_no_byte_breaks_the_reader(sound: Path, data: st.DataObject) -> None:
    """A config.json that is changed or truncated at any byte is read or rejected."""
    file = sound / CONFIG
    original = file.read_bytes()
    index = data.draw(st.integers(0, len(original) - 1))
    byte = data.draw(st.none() | st.sampled_from(b'0159-.,:"[]{}eE \n\x00\x80\xffax'))
    tail = b"" if byte is None else bytes([byte]) + original[index + 1 :]
    try:
        file.write_bytes(original[:index] + tail)
        assert unexpected(sound) is None
    finally:
        file.write_bytes(original)


def refusal(folder: Path) -> str:
    """Return the message of the CheckpointError."""
    with pytest.raises(CheckpointError) as refused:
        read_checkpoint(folder, "damaged")
    return str(refused.value)


def unexpected(folder: Path) -> str | None:
    """Return an unexpected result of reading a folder; None for a rejection or the right card."""
    try:
        card = read_checkpoint(folder, "m").card
    except CheckpointError:
        return None
    except Exception as error:  # noqa: BLE001 - any other is the finding
        return repr(error)
    return None if card.dimension == SHAPE.hidden and card.max_tokens > 0 else repr(card)


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a file."""
    value: dict[str, Any] = json.loads(file.read_bytes())
    return value


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Write an object to a file."""
    file.write_text(json.dumps(value))
