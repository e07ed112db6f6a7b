"""The copy for vLLM: links to the weights, and a config without remote code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from taskvec.checkpoint.checkpoint import Checkpoint, read_checkpoint
from taskvec.checkpoint.vllm_copy import make_vllm_copy, vllm_config
from taskvec.errors import CheckpointError

LINKED = {"model.safetensors", "tokenizer.json"}
WRITTEN = {"config.json", "tokenizer_config.json"}


@pytest.fixture
def checkpoint(default_checkpoint: Checkpoint, tmp_path: Path) -> Checkpoint:
    """The default model in a folder of which files may change."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(default_checkpoint.folder, folder)
    return read_checkpoint(folder, "copy")


def bidirectional(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint as an EuroBERT of the same size."""
    backbone = replace(checkpoint.backbone, architecture="eurobert", causal=False, qk_norm=False)
    return replace(checkpoint, backbone=backbone)


def config_of(folder: Path) -> dict[str, object]:
    """Return the config.json of a folder."""
    config: dict[str, object] = json.loads((folder / "config.json").read_text())
    return config


def test_weights_and_tokenizer_are_linked(default_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Weights and tokenizer are valid links to the files of the checkpoint."""
    folder = make_vllm_copy(default_checkpoint, tmp_path)
    assert folder.is_dir()
    assert folder.is_relative_to(tmp_path)
    assert {path.name for path in folder.iterdir()} == LINKED | WRITTEN
    for name in LINKED:
        link = folder / name
        assert link.is_symlink()
        assert link.resolve(strict=True) == (default_checkpoint.folder / name).resolve()
    assert not any((folder / name).is_symlink() for name in WRITTEN)


def test_adapters_are_left_out(default_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The copy does not contain adapters, prompts or Jina's task names."""
    folder = make_vllm_copy(default_checkpoint, tmp_path)
    assert not (folder / "adapters").exists()
    assert not (folder / "config_sentence_transformers.json").exists()
    assert "task_names" not in config_of(folder)
    bare = read_checkpoint(folder, "bare")
    assert bare.card.adapters == ()
    assert bare.backbone == default_checkpoint.backbone


def test_shards_come_with_their_index(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Every shard and the index are linked."""
    whole = checkpoint.folder / "model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    names = sorted(tensors)
    where = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({n: tensors[n] for n in names if where[n] == file}, checkpoint.folder / file)
    index = checkpoint.folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    folder = make_vllm_copy(read_checkpoint(checkpoint.folder, "sharded"), tmp_path / "cache")
    linked = {path.name: path.resolve(strict=True) for path in folder.iterdir()}
    assert {index.name, *where.values()} <= set(linked)
    assert "model.safetensors" not in linked
    loaded = {name: load_file(linked[where[name]])[name] for name in names}
    assert all(np.array_equal(loaded[name], tensors[name]) for name in names)


def test_a_checkpoint_of_links_is_linked_through(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """If the checkpoint files are links, as in the hub's cache, the copy links to their targets."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    blobs = {}
    for file in default_checkpoint.folder.iterdir():
        if file.is_file():
            blobs[file.name] = shutil.copy(file, tmp_path / f"blob-{len(blobs)}")
            (snapshot / file.name).symlink_to(blobs[file.name])
    for name in ("adapters", "1_Pooling"):
        shutil.copytree(default_checkpoint.folder / name, snapshot / name)
    folder = make_vllm_copy(read_checkpoint(snapshot, "hub"), tmp_path / "cache")
    for name in LINKED:
        assert (folder / name).readlink() == Path(blobs[name]).resolve()


def test_the_tokenizer_class_is_set(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The tokenizer config names a class, so that none is guessed from the architecture."""
    own = checkpoint.folder / "tokenizer_config.json"
    for text in (json.dumps({"tokenizer_class": "LlamaTokenizer"}), None):
        own.unlink()
        if text is not None:
            own.write_text(text)
        folder = make_vllm_copy(
            read_checkpoint(checkpoint.folder, "copy"), tmp_path / str(text)[:4]
        )
        config = json.loads((folder / "tokenizer_config.json").read_text())
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert not (folder / "tokenizer_config.json").is_symlink()
        assert own.is_file() == (text is not None)


def test_a_causal_backbone_is_a_qwen3(default_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The config is a Qwen3 with the sizes of the checkpoint, without remote code."""
    config = config_of(make_vllm_copy(default_checkpoint, tmp_path))
    assert config == vllm_config(default_checkpoint)
    assert (config["model_type"], config["architectures"]) == ("qwen3", ["Qwen3Model"])
    assert "auto_map" not in config
    assert config.get("is_causal") is not False
    check_sizes(default_checkpoint, config)


def test_a_bidirectional_backbone_is_a_llama(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """The config is vLLM's bidirectional Llama with pooling of the last token."""
    checkpoint = bidirectional(default_checkpoint)
    config = config_of(make_vllm_copy(checkpoint, tmp_path))
    assert config == vllm_config(checkpoint)
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaBidirectionalModel"])
    assert (config["is_causal"], config["pooling"]) == (False, "last")
    assert (config["mlp_bias"], config["attention_bias"]) == (False, False)
    assert "auto_map" not in config
    check_sizes(checkpoint, config)


def check_sizes(checkpoint: Checkpoint, config: dict[str, object]) -> None:
    """Check that the config has every size of the backbone, by transformers' names."""
    backbone = checkpoint.backbone
    sizes = {
        "hidden_size": backbone.hidden,
        "intermediate_size": backbone.intermediate,
        "num_hidden_layers": backbone.layers,
        "num_attention_heads": backbone.heads,
        "num_key_value_heads": backbone.kv_heads,
        "head_dim": backbone.head_dim,
        "vocab_size": backbone.vocabulary,
        "max_position_embeddings": backbone.max_positions,
        "rms_norm_eps": backbone.norm_eps,
        "rope_theta": backbone.rope_theta,  # for transformers 4; the next field is for 5
        "rope_parameters": {"rope_type": "default", "rope_theta": backbone.rope_theta},
        "hidden_act": "silu",
        "tie_word_embeddings": True,  # the weights do not contain a head
    }
    assert {name: config[name] for name in sizes} == sizes


def test_a_second_call_reuses_the_folder(default_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The same checkpoint has the same folder, which is written once."""
    first = make_vllm_copy(default_checkpoint, tmp_path)
    made = {path.name: path.lstat().st_ino for path in first.iterdir()}
    assert make_vllm_copy(default_checkpoint, tmp_path) == first
    assert {path.name: path.lstat().st_ino for path in first.iterdir()} == made
    assert list((tmp_path / "plain").iterdir()) == [first]


def moved_tokenizer(folder: Path) -> None:
    """Make the link to the tokenizer invalid."""
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(folder / "gone.json")


def copied_weights(folder: Path) -> None:
    """Replace the link to the weights by a file."""
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(b"old")


def lost_config(folder: Path) -> None:
    """Remove the config."""
    (folder / "config.json").unlink()


def cut_config(folder: Path) -> None:
    """Truncate the config."""
    config = folder / "config.json"
    config.write_text(config.read_text()[:20])


@pytest.mark.parametrize("damage", [moved_tokenizer, copied_weights, lost_config, cut_config])
def test_wrong_entries_are_written_again(
    default_checkpoint: Checkpoint, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """A dead link or a wrong file is replaced, and other entries are not touched."""
    folder = make_vllm_copy(default_checkpoint, tmp_path)
    damage(folder)
    before = {path.name: path.lstat().st_ino for path in folder.iterdir()}
    kept = make_vllm_copy(default_checkpoint, tmp_path)
    assert kept == folder
    assert {path.name for path in folder.iterdir()} == LINKED | WRITTEN
    for name in LINKED:
        assert (folder / name).readlink() == (default_checkpoint.folder / name).resolve()
    assert config_of(folder) == vllm_config(default_checkpoint)
    after = {path.name: path.lstat().st_ino for path in folder.iterdir()}
    assert len(set(after.items()) & set(before.items())) == len(LINKED | WRITTEN) - 1
    assert list((tmp_path / "plain").iterdir()) == [folder]


def test_a_complete_copy_needs_no_write_access(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """A complete copy is not written to: its modification time does not change."""
    folder = make_vllm_copy(default_checkpoint, tmp_path)
    times = [path.stat().st_mtime_ns for path in (folder, folder.parent)]
    make_vllm_copy(default_checkpoint, tmp_path)
    assert [path.stat().st_mtime_ns for path in (folder, folder.parent)] == times


def test_changed_weights_get_a_new_folder(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A changed weight file gets a new folder, and the old folder remains for running processes."""
    first = make_vllm_copy(checkpoint, tmp_path / "cache")
    weights = checkpoint.folder / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: values * 2 for name, values in tensors.items()}, weights)
    second = make_vllm_copy(read_checkpoint(checkpoint.folder, "copy"), tmp_path / "cache")
    assert second != first
    assert first.is_dir()


def test_an_incomplete_folder_is_replaced(default_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """An incomplete folder of an interrupted process is completed."""
    unfinished = make_vllm_copy(default_checkpoint, tmp_path).with_suffix(".part")
    unfinished.with_suffix("").rename(unfinished)
    (unfinished / "config.json").unlink()
    folder = make_vllm_copy(default_checkpoint, tmp_path)
    assert {path.name for path in folder.iterdir()} == LINKED | WRITTEN


def test_concurrent_processes_share_one_folder(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Processes that start at the same time get the same complete folder."""
    together = 8
    for cache in (tmp_path / str(number) for number in range(25)):
        barrier = Barrier(together)

        def prepare(cache: Path = cache, barrier: Barrier = barrier) -> Path:
            barrier.wait()
            return make_vllm_copy(default_checkpoint, cache)

        with ThreadPoolExecutor(together) as threads:
            calls = [threads.submit(prepare) for _ in range(together)]
            folders = {call.result() for call in calls}
        (folder,) = folders
        assert {path.name for path in folder.iterdir()} == LINKED | WRITTEN


def test_a_cache_that_cannot_be_written_is_named(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """The message names the model, the folder and the setting to change."""
    (tmp_path / "file").write_text("no folder")
    for cache in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError) as refusal:
            make_vllm_copy(default_checkpoint, cache)
        sentence = str(refusal.value)
        assert default_checkpoint.card.name in sentence
        assert str(cache) in sentence
        assert "--cache-dir" in sentence
        assert sentence.endswith(".")
        assert "\n" not in sentence
