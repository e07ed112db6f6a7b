"""Engine arguments of vLLM for a checkpoint, and the equal command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.engines.vllm.arguments import (
    LORA_RANKS,
    VllmOptions,
    engine_arguments,
    server_command,
)

FOLDER = Path("/cache/plain/abc")
on_both = pytest.mark.parametrize("gpu", [True, False], ids=["gpu", "cpu"])


def sized(checkpoint: Checkpoint, *, max_tokens: int, causal: bool = True) -> Checkpoint:
    """Return the checkpoint with another limit, causal or bidirectional."""
    backbone = replace(checkpoint.backbone, causal=causal, max_positions=max_tokens)
    return replace(
        checkpoint, backbone=backbone, card=replace(checkpoint.card, max_tokens=max_tokens)
    )


def ranked(checkpoint: Checkpoint, *ranks: int) -> Checkpoint:
    """Return the checkpoint with adapters of these ranks."""
    adapters = zip(checkpoint.adapters, ranks, strict=False)
    return replace(checkpoint, adapters=tuple(replace(a, rank=rank) for a, rank in adapters))


def arguments(checkpoint: Checkpoint, *, gpu: bool = True, **options: Any) -> dict[str, Any]:
    """Return the engine arguments for a checkpoint."""
    return engine_arguments(checkpoint, FOLDER, VllmOptions(**options), gpu=gpu)


@on_both
def test_it_pools_the_last_token_of_token_ids(default_checkpoint: Checkpoint, gpu: bool) -> None:
    """VLLM pools the last token of token ids, without a tokenizer and without prefix caching."""
    given = arguments(default_checkpoint, gpu=gpu)
    assert given["model"] == str(FOLDER)
    assert (given["runner"], given["convert"]) == ("pooling", "embed")
    assert given["pooler_config"] == {"pooling_type": "LAST"}
    assert given["skip_tokenizer_init"] is True
    assert given["enable_prefix_caching"] is False
    assert "trust_remote_code" not in given


@on_both
def test_every_adapter_can_be_in_one_batch(default_checkpoint: Checkpoint, gpu: bool) -> None:
    """VLLM loads all adapters at once, for the linear layers only."""
    given = arguments(default_checkpoint, gpu=gpu)
    assert given["enable_lora"] is True
    assert given["max_loras"] == given["max_cpu_loras"] == 4
    assert given["max_lora_rank"] == 16
    assert sorted(given["lora_target_modules"]) == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "wanted"),
    [((1,), 1), ((2,), 8), ((8, 8), 8), ((8, 9), 16), ((33, 4), 64), ((200,), 256), ((512,), 512)],
)
def test_the_rank_is_valid_for_vllm(
    default_checkpoint: Checkpoint, ranks: tuple[int, ...], wanted: int
) -> None:
    """max_lora_rank is the smallest valid rank that is enough for every adapter."""
    given = arguments(ranked(default_checkpoint, *ranks))
    assert given["max_lora_rank"] == wanted
    assert wanted in LORA_RANKS
    assert given["max_loras"] == len(ranks)


def test_without_adapters_there_is_no_lora(default_checkpoint: Checkpoint) -> None:
    """LoRA is not enabled for a plain backbone."""
    bare = replace(default_checkpoint, adapters=())
    assert not [name for name in arguments(bare) if "lora" in name]
    assert "--lora-modules" not in server_command(bare, FOLDER, VllmOptions(), gpu=True)


@pytest.mark.parametrize(("asked", "wanted"), [(0, 2048), (512, 512), (2048, 2048), (9999, 2048)])
def test_texts_are_never_longer_than_the_model_allows(
    default_checkpoint: Checkpoint, asked: int, wanted: int
) -> None:
    """The text limit is the operator's, at most that of the model."""
    assert arguments(default_checkpoint, max_tokens=asked)["max_model_len"] == wanted


@pytest.mark.parametrize(
    ("gpu", "asked", "longest", "causal", "wanted"),
    [
        (True, 0, 8192, True, 32_768),
        (False, 0, 8192, True, 4096),
        (True, 0, 8192, False, 32_768),
        (False, 0, 8192, False, 8192),
        (False, 0, 1024, False, 4096),
        (True, 1000, 8192, True, 1000),
        (True, 1000, 8192, False, 8192),
        (True, 10_000, 8192, False, 10_000),
    ],
)
def test_a_bidirectional_text_fits_one_forward(  # noqa: PLR0917 - pytest calls it by name
    default_checkpoint: Checkpoint,
    gpu: bool,
    asked: int,
    longest: int,
    causal: bool,
    wanted: int,
) -> None:
    """A causal text may be computed in chunks; a bidirectional text must fit into one forward."""
    checkpoint = sized(default_checkpoint, max_tokens=longest, causal=causal)
    given = arguments(checkpoint, gpu=gpu, max_batch_tokens=asked)
    assert given["max_num_batched_tokens"] == wanted
    assert given["max_model_len"] == longest


def test_a_lower_text_limit_allows_a_smaller_forward(default_checkpoint: Checkpoint) -> None:
    """With a lower text limit, one forward must only fit texts of that length."""
    checkpoint = sized(default_checkpoint, max_tokens=8192, causal=False)
    given = arguments(checkpoint, max_batch_tokens=100, max_tokens=500)
    assert given["max_num_batched_tokens"] == 500


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_dtype(default_checkpoint: Checkpoint, dtype: str) -> None:
    """The dtype is the operator's; auto is bfloat16, regardless of the stored dtype."""
    assert arguments(default_checkpoint, dtype=dtype)["dtype"] == dtype
    assert arguments(default_checkpoint, dtype="auto")["dtype"] == "bfloat16"


def test_options_override_the_defaults_of_the_device(default_checkpoint: Checkpoint) -> None:
    """Options of the operator are used; 0 selects the default of the device."""
    options = {
        "max_batch_texts": 7,
        "memory_share": 0.25,
        "tensor_parallel": 2,
        "data_parallel": 3,
    }
    names = (
        "max_num_seqs",
        "gpu_memory_utilization",
        "tensor_parallel_size",
        "data_parallel_size",
    )
    for gpu, usual in ((True, [1024, 0.9, 1, 1]), (False, [256, 0.3, 1, 1])):
        given = arguments(default_checkpoint, gpu=gpu, **options)
        assert [given[name] for name in names] == [7, 0.25, 2, 3]
        left = arguments(default_checkpoint, gpu=gpu)
        assert [left[name] for name in names] == usual


def test_only_a_cpu_runs_without_graphs(default_checkpoint: Checkpoint) -> None:
    """enforce_eager is for CPUs; a GPU captures graphs."""
    assert arguments(default_checkpoint, gpu=False)["enforce_eager"] is True
    assert "enforce_eager" not in arguments(default_checkpoint, gpu=True)


def test_extra_arguments_override_all_others(default_checkpoint: Checkpoint) -> None:
    """Arguments by vLLM's names override those of taskvec."""
    extra = {"max_loras": 9, "seed": 5, "dtype": "float32", "lora_target_modules": ["q_proj"]}
    given = arguments(default_checkpoint, dtype="float16", extra=extra)
    assert {name: given[name] for name in extra} == extra
    assert extra == {
        "max_loras": 9, "seed": 5, "dtype": "float32", "lora_target_modules": ["q_proj"],
    }  # fmt: skip


def parsed(words: list[str]) -> dict[str, list[str]]:
    """Return the values of each flag."""
    flags: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            assert word not in flags, "a flag twice: the last would win"
            values = flags[word] = []
        else:
            values.append(word)
    return flags


@on_both
def test_the_command_line_equals_the_arguments(default_checkpoint: Checkpoint, gpu: bool) -> None:
    """Each engine argument is one flag with its value: a server embeds as the engine would.

    But a server's other routes do not start without a tokenizer, and a gateway's requests to it
    have no priorities.
    """
    given = arguments(default_checkpoint, gpu=gpu)
    words = server_command(default_checkpoint, FOLDER, VllmOptions(), gpu=gpu)
    assert words[:3] == ["vllm", "serve", str(FOLDER)]
    flags = parsed(words[3:])
    assert flags.pop("--served-model-name") == [default_checkpoint.card.name]
    homes = flags.pop("--lora-modules")
    assert homes == [f"{a.name}={a.weights.parent}" for a in default_checkpoint.adapters]
    del given["model"], given["skip_tokenizer_init"], given["scheduling_policy"]
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        if value is False:
            assert flags.pop(f"--no-{flag[2:]}") == []
        elif value is True:
            assert flags.pop(flag) == []
        elif isinstance(value, list):
            assert flags.pop(flag) == value
        elif isinstance(value, dict):
            assert json.loads(flags.pop(flag)[0]) == value
        else:
            assert flags.pop(flag) == [str(value)]
    assert flags == {}


def test_the_command_line_takes_the_options(default_checkpoint: Checkpoint) -> None:
    """Options and extra arguments are on the command line, objects as JSON."""
    extra = {"compilation_config": {"mode": 0}, "enable_prefix_caching": True, "model": "/other"}
    options = VllmOptions(dtype="float32", max_tokens=100, extra=extra)
    words = server_command(default_checkpoint, FOLDER, options, gpu=True)
    assert words[2] == "/other"
    flags = parsed(words[3:])
    assert flags["--dtype"] == ["float32"]
    assert flags["--max-model-len"] == ["100"]
    assert json.loads(flags["--compilation-config"][0]) == {"mode": 0}
    assert flags["--enable-prefix-caching"] == []
    assert "--no-enable-prefix-caching" not in flags
