"""Reading checkpoint folders in the published layouts, for both architectures."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from synthetic import ADAPTERS, TINY_NANO, TINY_SMALL, Shape, write_adapter, write_checkpoint
from taskvec.checkpoint.checkpoint import Checkpoint, read_checkpoint
from taskvec.checkpoint.files import tensor_shapes
from taskvec.errors import CheckpointError
from taskvec.service import task_table

SMALLEST = {"vocabulary": 64, "hidden": 16, "layers": 2, "intermediate": 24, "rank": 4}
QWEN = replace(TINY_SMALL, heads=2, kv_heads=1, head_dim=16, **SMALLEST)
EURO = replace(TINY_NANO, heads=2, kv_heads=2, head_dim=8, **SMALLEST)
SHAPES = {"qwen3": QWEN, "eurobert": EURO}


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> Shape:
    """A small shape of each architecture."""
    return SHAPES[request.param]


def test_the_jina_layout_is_read(tmp_path: Path, shape: Shape) -> None:
    """Config, weights, adapters, prompts and tokenizer are read from the layout of Jina v5."""
    checkpoint = read(write_checkpoint(tmp_path, shape))
    backbone, card = checkpoint.backbone, checkpoint.card
    read_shape = {name: getattr(backbone, name) for name in vars(shape) if name != "rank"}
    assert read_shape == {name: value for name, value in vars(shape).items() if name != "rank"}
    assert backbone.causal is backbone.qk_norm is (shape.architecture == "qwen3")
    assert (card.name, card.revision) == ("m", None)
    assert (card.architecture, card.dimension) == (shape.architecture, shape.hidden)
    assert (card.vocabulary, card.max_tokens) == (shape.vocabulary, shape.max_positions)
    assert card.adapters == ADAPTERS
    assert checkpoint.tokenizer == tmp_path / "tokenizer.json"
    assert checkpoint.prompts == {"query": "Query: ", "document": "Document: "}
    assert checkpoint.default_prompt is None


def test_every_tensor_is_mapped(tmp_path: Path, shape: Shape) -> None:
    """Each tensor of the backbone is mapped to a file and a key with the same shape."""
    checkpoint = read(write_checkpoint(tmp_path, shape))
    stored = tensor_shapes(tmp_path / "model.safetensors")
    assert {name: stored[key] for name, (_, key) in checkpoint.weights.items()} == dict(
        checkpoint.backbone.tensors()
    )
    assert checkpoint.card.parameters == sum(map(math.prod, stored.values()))


def test_every_adapter_tensor_is_mapped(tmp_path: Path, shape: Shape) -> None:
    """Each adapter maps every linear layer of every transformer layer to its A and B."""
    checkpoint = read(write_checkpoint(tmp_path, shape))
    modules = checkpoint.backbone.projections
    for adapter in checkpoint.adapters:
        stored = tensor_shapes(adapter.weights)
        assert adapter.weights.parent == tmp_path / "adapters" / adapter.name
        assert set(adapter.keys) == {(layer, name) for layer in range(2) for name in modules}
        for (layer, name), (down, up) in adapter.keys.items():
            assert f"layers.{layer}.{name}.lora_A" in down
            assert stored[down] == (shape.rank, modules[name][1])
            assert stored[up] == (modules[name][0], shape.rank)


def test_head_dim_follows_from_the_width(tmp_path: Path) -> None:
    """Without head_dim, as in EuroBERT's config, it is the hidden size divided by the heads."""
    write_checkpoint(tmp_path, EURO)
    assert "head_dim" not in config(tmp_path)
    assert read(tmp_path).backbone.head_dim == 8


def test_kv_heads_default_to_heads(tmp_path: Path) -> None:
    """Without num_key_value_heads, every query head has its own key and value head."""
    write_checkpoint(tmp_path, EURO)
    change(tmp_path, num_key_value_heads=None)
    assert read(tmp_path).backbone.kv_heads == 2


def test_shards_are_read_through_the_index(tmp_path: Path, shape: Shape) -> None:
    """Weights in several files with an index are read as one backbone."""
    checkpoint = read(write_checkpoint(tmp_path, shape, shards=3))
    files = {file.name for file, _ in checkpoint.weights.values()}
    assert files == {f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)}
    for file, key in checkpoint.weights.values():
        assert key in tensor_shapes(file)


def test_a_single_file_takes_precedence_over_an_index(tmp_path: Path) -> None:
    """If model.safetensors exists, an index file is ignored."""
    write_checkpoint(tmp_path, QWEN)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone"}}')
    assert {file.name for file, _ in read(tmp_path).weights.values()} == {"model.safetensors"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtypes_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    """Backbone and adapters may be stored as bfloat16, float16 or float32."""
    checkpoint = read(write_checkpoint(tmp_path, QWEN, dtype=dtype))
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {
        dtype
    }
    assert checkpoint.card.adapters == ADAPTERS


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_key_prefix_is_removed(tmp_path: Path, shape: Shape, prefix: str) -> None:
    """A tensor named model.x, as in language models, is read as x."""
    checkpoint = read(write_checkpoint(tmp_path, shape, key_prefix=prefix))
    assert set(checkpoint.weights) == {name for name, _ in checkpoint.backbone.tensors()}
    assert {key for _, key in checkpoint.weights.values()} == {
        prefix + name for name in checkpoint.weights
    }
    assert checkpoint.card.architecture == shape.architecture


def test_the_language_model_head_is_ignored(tmp_path: Path) -> None:
    """lm_head and stored rotary frequencies are not part of the checkpoint's weights."""
    write_checkpoint(tmp_path, QWEN, key_prefix="model.")
    file = tmp_path / "model.safetensors"
    further = {
        "lm_head.weight": torch.zeros(64, 16),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
    }
    save_file(load_file(file) | further, file)
    assert not {key for _, key in read(tmp_path).weights.values()} & set(further)


def test_adapters_keep_the_order_of_the_config(tmp_path: Path) -> None:
    """Adapters have the order of task_names, because the first is the default task."""
    names = ("text-matching", "classification", "retrieval")
    checkpoint = read(write_checkpoint(tmp_path, QWEN, adapters=names))
    assert checkpoint.card.adapters == names
    assert tuple(adapter.name for adapter in checkpoint.adapters) == names


def test_an_unlisted_adapter_is_found(tmp_path: Path) -> None:
    """An adapter folder that task_names does not list follows the listed ones."""
    write_checkpoint(tmp_path, QWEN, adapters=("text-matching", "clustering"))
    random = torch.Generator().manual_seed(1)
    write_adapter(tmp_path / "adapters" / "legal-v2.1", QWEN, random)
    write_adapter(tmp_path / "adapters" / "code", QWEN, random)
    (tmp_path / "adapters" / ".cache").mkdir()
    (tmp_path / "adapters" / "README.md").write_text("No adapter.\n")
    assert read(tmp_path).card.adapters == ("text-matching", "clustering", "code", "legal-v2.1")


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"lora_alpha": 4}, 1.0),
        ({"lora_alpha": 32}, 8.0),
        ({"lora_alpha": 3}, 0.75),
        ({"lora_alpha": 4, "use_rslora": True}, 2.0),
    ],
)
def test_the_scale_is_alpha_by_rank(tmp_path: Path, settings: dict[str, Any], scale: float) -> None:
    """LoRA scales by alpha / r, rank-stabilised LoRA by alpha / sqrt(r)."""
    write_checkpoint(tmp_path, QWEN, adapters=())
    random = torch.Generator().manual_seed(1)
    write_adapter(tmp_path / "adapters" / "code", QWEN, random, **settings)
    (adapter,) = read(tmp_path).adapters
    assert (adapter.rank, adapter.scale) == (4, scale)


def test_an_adapter_may_leave_layers_out(tmp_path: Path) -> None:
    """An adapter for some modules maps only those."""
    write_checkpoint(tmp_path, QWEN, adapters=())
    folder = tmp_path / "adapters" / "code"
    random = torch.Generator().manual_seed(1)
    write_adapter(folder, QWEN, random, target_modules=r".*\.q_proj")
    weights = folder / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(weights).items() if "_proj" in k and "q_" in k}, weights)
    (adapter,) = read(tmp_path).adapters
    assert set(adapter.keys) == {(0, "self_attn.q_proj"), (1, "self_attn.q_proj")}


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.removeprefix("base_model.model."),
        lambda key: key.replace("base_model.model.", "base_model.model.model."),
        lambda key: key.replace(".weight", ".default.weight"),
    ],
    ids=["bare", "model", "default"],
)
def test_adapter_keys_are_known_in_all_spellings(tmp_path: Path, rename: Any) -> None:
    """Keys with PEFT's prefixes and with the adapter name are recognised."""
    write_checkpoint(tmp_path, QWEN, adapters=("code",))
    weights = tmp_path / "adapters" / "code" / "adapter_model.safetensors"
    save_file({rename(key): tensor for key, tensor in load_file(weights).items()}, weights)
    (adapter,) = read(tmp_path).adapters
    assert len(adapter.keys) == 2 * 7


def test_a_plain_backbone_has_one_task(tmp_path: Path, shape: Shape) -> None:
    """A plain qwen3 or eurobert checkpoint without adapters is served as one task."""
    write_checkpoint(tmp_path, shape, jina=False, adapters=())
    (tmp_path / "config_sentence_transformers.json").unlink()
    checkpoint = read(tmp_path)
    assert checkpoint.card.adapters == ()
    assert checkpoint.prompts == {}
    (task,) = task_table(checkpoint)
    assert (task.name, task.adapter, task.prompt) == ("embedding", None, "")


def test_a_plain_backbone_uses_its_default_prompt(tmp_path: Path) -> None:
    """Without adapters and a query prompt, sentence-transformers' default prompt is used."""
    write_checkpoint(tmp_path, QWEN, jina=False, adapters=())
    prompts = {"prompts": {"topic": "T: ", "passage": "P: "}, "default_prompt_name": "passage"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    (task,) = task_table(read(tmp_path))
    assert task.prompt == "P: "


def test_a_plain_backbone_may_have_adapters(tmp_path: Path, shape: Shape) -> None:
    """Adapters of a plain backbone, which has no task_names, are read by folder name."""
    checkpoint = read(
        write_checkpoint(tmp_path, shape, jina=False, adapters=("retrieval", "clustering"))
    )
    assert task_table(checkpoint).names == ["clustering", "retrieval.query", "retrieval.passage"]


@pytest.mark.parametrize(
    ("stated", "limit"),
    [(10**30, 300), (512, 300), (128, 128), (128.0, 128), (None, 300), (0, 300)],
)
def test_the_longest_text_is_the_smaller_limit(
    tmp_path: Path, stated: float | None, limit: int
) -> None:
    """tokenizer_config.json may lower the limit of the positions; 1e30 means no limit."""
    write_checkpoint(tmp_path, replace(QWEN, max_positions=300), adapters=())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": stated}))
    assert read(tmp_path).card.max_tokens == limit


def test_without_a_tokenizer_config_the_positions_are_the_limit(tmp_path: Path) -> None:
    """tokenizer_config.json is not required."""
    write_checkpoint(tmp_path, QWEN, adapters=())
    (tmp_path / "tokenizer_config.json").unlink()
    assert read(tmp_path).card.max_tokens == QWEN.max_positions


@pytest.mark.parametrize(
    ("jina", "listed", "dimensions"),
    [
        (True, None, (32, 64)),  # the published list of the model, up to the width
        (True, [16, 48], (16, 48)),
        (False, None, ()),
        (False, [96, 64, 8, 128], (8, 64, 96)),
    ],
)
def test_matryoshka_dimensions(
    tmp_path: Path, jina: bool, listed: list[int] | None, dimensions: tuple[int, ...]
) -> None:
    """The dimensions are those of the config or of Jina v5, ascending and within the width."""
    write_checkpoint(tmp_path, replace(QWEN, hidden=96), jina=jina, adapters=())
    change(tmp_path, matryoshka_dimensions=listed)
    assert read(tmp_path).card.matryoshka == dimensions


def test_rope_theta_is_found_in_both_places(tmp_path: Path) -> None:
    """rope_theta is read from the fields of transformers 4 and of transformers 5."""
    write_checkpoint(tmp_path, QWEN, adapters=())
    newer = {"rope_type": "default", "rope_theta": 5000.0}
    change(tmp_path, rope_theta=None, rope_parameters=newer)
    assert read(tmp_path).backbone.rope_theta == 5000.0


def read(folder: Path) -> Checkpoint:
    """Read the folder as a checkpoint named "m"."""
    return read_checkpoint(folder, "m")


def config(folder: Path) -> dict[str, Any]:
    """Return its config.json."""
    value: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
    return value


def change(folder: Path, **values: Any) -> None:
    """Change values of config.json; None removes a key."""
    changed = config(folder) | values
    kept = {key: value for key, value in changed.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def test_an_adapter_may_have_its_own_prompts(tmp_path: Path, shape: Shape) -> None:
    """An adapter folder with a prompts file uses those prompts."""
    write_checkpoint(tmp_path, shape, adapters=("retrieval", "legal"))
    prompts = {"prompts": {"query": "Case: ", "document": "Law: "}}
    own = tmp_path / "adapters" / "legal" / "config_sentence_transformers.json"
    own.write_text(json.dumps(prompts))
    assert [(task.name, task.prompt) for task in task_table(read(tmp_path))] == [
        ("retrieval.query", "Query: "),
        ("retrieval.passage", "Document: "),
        ("legal.query", "Case: "),
        ("legal.passage", "Law: "),
    ]
    own.write_text(json.dumps({"prompts": {"query": 1}}))
    with pytest.raises(CheckpointError, match=r"adapters/legal/.*must be an object of strings"):
        read(tmp_path)
