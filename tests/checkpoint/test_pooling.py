"""What sentence-transformers' files state is what is served, or is rejected by name.

sentence-transformers itself says which statements change the vectors.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from synthetic import TINY_NANO, TINY_SMALL, write_checkpoint
from taskvec.checkpoint.checkpoint import Checkpoint, read_checkpoint
from taskvec.checkpoint.open import DEFAULT_MODEL, open_checkpoint
from taskvec.checkpoint.reference import reference_vectors
from taskvec.errors import CheckpointError
from taskvec.service import build_tokenizer

SMALLEST: dict[str, Any] = {"vocabulary": 27_173, "hidden": 16, "layers": 2, "intermediate": 24}
QWEN = replace(TINY_SMALL, heads=2, kv_heads=1, head_dim=8, rank=4, max_positions=64, **SMALLEST)
EURO = replace(TINY_NANO, heads=2, kv_heads=2, head_dim=8, rank=4, max_positions=64, **SMALLEST)
TEXT = "The House on the hill has nine windows"

MODULES, POOLING = "modules.json", "1_Pooling/config.json"
OPTIONS, PROMPTS = "sentence_bert_config.json", "config_sentence_transformers.json"

Files = dict[str, Any]


def module(index: int, kind: str, path: str = "") -> dict[str, Any]:
    """Return an entry of modules.json."""
    kind = kind if "." in kind else f"sentence_transformers.models.{kind}"
    return {"idx": index, "name": str(index), "path": path, "type": kind}


def listed(*more: dict[str, Any], first: str = "Transformer") -> list[dict[str, Any]]:
    """Return a modules.json with pooling and further modules."""
    return [module(0, first), module(1, "Pooling", "1_Pooling"), *more]


def pooling(**modes: Any) -> dict[str, Any]:
    """Return a pooling config."""
    return {"word_embedding_dimension": 16, **modes}


LAST: Files = {
    MODULES: listed(module(2, "Normalize", "2_Normalize")),
    POOLING: pooling(pooling_mode_lasttoken=True),
}
"""What a checkpoint with last-token pooling has; the cases below differ from it."""

# The name of what is refused: the files; None if the vector is the last token's.
STATEMENTS: dict[str, tuple[str | None, Files]] = {
    "last token": (None, {}),
    "without normalising": (None, {MODULES: listed()}),
    "with dropout": (
        None,
        {
            MODULES: listed(module(2, "Dropout", "2_Dropout")),
            "2_Dropout/config.json": {"dropout": 0.5},
        },
    ),
    "last token, new": (None, {POOLING: {"embedding_dimension": 16, "pooling_mode": "lasttoken"}}),
    "last token, list": (
        None,
        {POOLING: {"embedding_dimension": 16, "pooling_mode": ["lasttoken"]}},
    ),
    "new before old": (
        None,
        {POOLING: pooling(pooling_mode="lasttoken", pooling_mode_mean_tokens=True)},
    ),
    "prompts left out": (
        None,
        {POOLING: pooling(pooling_mode_lasttoken=True, include_prompt=False)},
    ),
    "new class names": (
        None,
        {
            MODULES: [
                module(0, "sentence_transformers.base.modules.transformer.Transformer"),
                module(
                    1,
                    "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
                    "1_Pooling",
                ),
                module(2, "sentence_transformers.base.modules.normalize.Normalize", "2_Normalize"),
            ]
        },
    ),
    "mean": ("mean", {POOLING: pooling(pooling_mode_mean_tokens=True)}),
    "mean, new": ("mean", {POOLING: {"embedding_dimension": 16, "pooling_mode": "mean"}}),
    "first token": ("cls", {POOLING: pooling(pooling_mode_cls_token=True)}),
    "largest": ("max", {POOLING: pooling(pooling_mode_max_tokens=True)}),
    "mean by root": (
        "mean_sqrt_len_tokens",
        {POOLING: pooling(pooling_mode_mean_sqrt_len_tokens=True)},
    ),
    "weighted mean": ("weightedmean", {POOLING: pooling(pooling_mode_weightedmean_tokens=True)}),
    "two modes": (
        "mean and lasttoken",
        {POOLING: pooling(pooling_mode_mean_tokens=True, pooling_mode_lasttoken=True)},
    ),
    "two modes, new": (
        "mean and lasttoken",
        {POOLING: {"embedding_dimension": 16, "pooling_mode": ["mean", "lasttoken"]}},
    ),
    "all modes off": ("mean", {POOLING: pooling(pooling_mode_lasttoken=False)}),
    "no mode": ("mean", {POOLING: pooling()}),
    "dense": ("2_Dense", {MODULES: listed(module(2, "Dense", "2_Dense"))}),
    "layer norm": ("2_LayerNorm", {MODULES: listed(module(2, "LayerNorm", "2_LayerNorm"))}),
    "lower case": ("do_lower_case", {OPTIONS: {"do_lower_case": True}}),
    "not lower case": (None, {OPTIONS: {"do_lower_case": False, "max_seq_length": None}}),
    "number type": (None, {OPTIONS: {"model_args": {"torch_dtype": "float32"}}}),
    "padding side": (None, {OPTIONS: {"tokenizer_args": {"padding_side": "left"}}}),
    "further config": (
        "rope_parameters",
        {
            OPTIONS: {
                "config_args": {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
            }
        },
    ),
    "no special tokens": (
        "add_special_tokens",
        {OPTIONS: {"processing_kwargs": {"text": {"add_special_tokens": False}}}},
    ),
    "task": (None, {OPTIONS: {"transformer_task": "feature-extraction"}}),
    "output": (
        None,
        {
            OPTIONS: {
                "modality_config": {
                    "text": {"method": "forward", "method_output_name": "last_hidden_state"}
                },
                "module_output_name": "token_embeddings",
            }
        },
    ),
    "old name of the options": (
        "do_lower_case",
        {"sentence_roberta_config.json": {"do_lower_case": True}},
    ),
    "empty options": (
        "do_lower_case",
        {OPTIONS: {}, "sentence_xlnet_config.json": {"do_lower_case": True}},
    ),
    "options that are not read": (
        None,
        {OPTIONS: {"max_seq_length": 60}, "sentence_xlnet_config.json": {"do_lower_case": True}},
    ),
}

# What sentence-transformers cannot load without other files, or loads as another kind of model.
OTHERS: dict[str, tuple[str, Files]] = {
    "code of its own": ("custom_st.Transformer", {MODULES: listed(first="custom_st.Transformer")}),
    "pooling of its own": (
        "own.Pooling",
        {MODULES: [module(0, "Transformer"), module(1, "own.Pooling", "1_Pooling")]},
    ),
    "unknown module": ("NewThing", {MODULES: listed(module(2, "NewThing", "2_NewThing"))}),
    "pickled CNN": ("2_CNN", {MODULES: listed(module(2, "CNN", "2_CNN"))}),
    "router": ("Router", {MODULES: [module(0, "Router")]}),
    "static": ("StaticEmbedding", {MODULES: [module(0, "StaticEmbedding")]}),
    "another folder": (
        "0_Transformer",
        {MODULES: [module(0, "Transformer", "0_Transformer"), module(1, "Pooling", "1_Pooling")]},
    ),
    "no pooling config": ("1_Pooling/config.json is missing", {POOLING: None}),
    "sparse": ("SparseEncoder", {PROMPTS: {"model_type": "SparseEncoder"}}),
    "many vectors": ("MultiVectorEncoder", {PROMPTS: {"model_type": "MultiVectorEncoder"}}),
    "another task": ("transformer_task", {OPTIONS: {"transformer_task": "text-generation"}}),
    "another output": (
        "module_output_name",
        {OPTIONS: {"module_output_name": "sentence_embedding"}},
    ),
    "another modality": ("modality_config", {OPTIONS: {"modality_config": {"image": {}}}}),
    "another method": (
        "get_text_features",
        {OPTIONS: {"modality_config": {"text": {"method": "get_text_features"}}}},
    ),
    "another tokenizer": ("tokenizer_name_or_path", {OPTIONS: {"tokenizer_name_or_path": "bert"}}),
    "length of a query": ("query_length", {OPTIONS: {"query_length": 8}}),
    "unknown option": ("new_option", {OPTIONS: {"new_option": 1}}),
    "negative length": ("-1", {OPTIONS: {"max_seq_length": -1}}),
    "length as a word": ("'x'", {OPTIONS: {"max_seq_length": "x"}}),
    "arguments as a list": ("model_args", {OPTIONS: {"model_args": [1]}}),
    "modules as an object": (MODULES, {MODULES: {"a": 1}}),
    "a module as a word": (MODULES, {MODULES: ["Transformer"]}),
    "a module without a type": (MODULES, {MODULES: [{"path": ""}]}),
    "a path outside": ("..", {MODULES: [module(0, "Transformer", "../x")]}),
    "an absolute path": ("/etc", {MODULES: [module(0, "Transformer", "/etc")]}),
    "a path as a number": ("7", {MODULES: [{"type": "Transformer", "path": 7}]}),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 checkpoint without files of sentence-transformers."""
    folder = write_checkpoint(tmp_path_factory.mktemp("plain") / "m", QWEN, jina=False, adapters=())
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "!"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    file = folder / "tokenizer.json"
    cased = json.loads(file.read_text()) | {"normalizer": None}
    file.unlink()
    file.write_text(json.dumps(cased))
    return folder


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    """A copy of it, as links, with the statements of last-token pooling."""
    for file in plain.iterdir():
        (tmp_path / file.name).symlink_to(file)
    state(tmp_path, LAST)
    return tmp_path


@pytest.mark.parametrize("case", STATEMENTS)
def test_what_is_stated_is_served_or_rejected(folder: Path, case: str) -> None:
    """A checkpoint is accepted exactly if sentence-transformers gives the last token's vector."""
    named, files = STATEMENTS[case]
    state(folder, files)
    save_modules(folder, files)
    theirs = sentence_transformer(folder).encode([TEXT], prompt="", normalize_embeddings=True)[0]
    ours = last_token_vector(folder)
    same = theirs.shape == ours.shape and float(theirs @ ours) > 0.9999
    assert same is (named is None)
    if named is None:
        assert read_checkpoint(folder, "m").card.max_tokens > 0
    else:
        assert named in refusal(folder)


@pytest.mark.parametrize("case", OTHERS)
def test_what_cannot_be_known_is_rejected(folder: Path, case: str) -> None:
    """Classes, files and options that may change the vectors are rejected by name."""
    named, files = OTHERS[case]
    state(folder, files)
    assert named in refusal(folder)


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({POOLING: pooling(pooling_mode_mean_tokens=True)}, "mean"),
        ({"2_Dense/config.json": {"in_features": 16, "out_features": 16}}, "2_Dense"),
        ({OPTIONS: {"do_lower_case": True}}, "do_lower_case"),
    ],
    ids=["pooling", "dense", "options"],
)
def test_folders_count_without_a_list(folder: Path, files: Files, named: str) -> None:
    """Without modules.json, folders of modules are read, as other servers do."""
    state(folder, {MODULES: None, **files})
    assert named in refusal(folder)


def test_a_checkpoint_that_states_nothing_is_served(plain: Path) -> None:
    """Without files of sentence-transformers, the vector is the last token's, as documented."""
    assert read_checkpoint(plain, "m").card.max_tokens == 64


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({"max_seq_length": 5}, 5),
        ({"max_seq_length": 1000}, 64),
        ({"tokenizer_args": {"model_max_length": 9}}, 9),
        ({"processing_kwargs": {"text": {"max_length": 7}}}, 7),
    ],
    ids=str,
)
def test_a_stated_length_is_the_limit(folder: Path, options: Files, tokens: int) -> None:
    """Longer texts are truncated where sentence-transformers truncates them."""
    state(folder, {OPTIONS: options})
    checkpoint = read_checkpoint(folder, "m")
    assert checkpoint.card.max_tokens == tokens
    if tokens == 64:
        return
    tokenizer = build_tokenizer(checkpoint, max_tokens=0, threads=1)
    (ids,) = tokenizer.encode_now([TEXT * 3], prompt="", truncate=True)
    tokenizer.close()
    theirs = sentence_transformer(folder).preprocess([TEXT * 3])["input_ids"][0]
    assert ids.tolist() == theirs.tolist()


@pytest.mark.parametrize("shape", [QWEN, EURO], ids=["small", "nano"])
def test_code_of_jinas_repositories_is_no_reason(tmp_path: Path, shape: Any) -> None:
    """With Jina's model type, a class of the repository is accepted with options of its own."""
    write_checkpoint(tmp_path, shape)
    state(
        tmp_path,
        {
            MODULES: [
                module(0, "custom_st.Transformer"),
                module(1, "Pooling", "1_Pooling"),
                module(2, "Normalize", "2_Normalize"),
            ],
            POOLING: pooling(pooling_mode_lasttoken=True),
            OPTIONS: {"max_seq_length": 32, "model_args": {"default_task": "retrieval"}, "x": 1},
        },
    )
    assert read_checkpoint(tmp_path, "m").card.max_tokens == 64
    state(tmp_path, {MODULES: [module(0, "custom_st.Transformer")], POOLING: None})
    assert read_checkpoint(tmp_path, "m").card.max_tokens == 64


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({POOLING: pooling(pooling_mode_mean_tokens=True)}, "mean"),
        (
            {MODULES: listed(module(2, "Dense", "2_Dense"), first="custom_st.Transformer")},
            "2_Dense",
        ),
        ({MODULES: [module(0, "own.Transformer"), module(1, "own.Dense", "1_Dense")]}, "1_Dense"),
        (
            {
                MODULES: [module(0, "own.Transformer"), module(1, "own.Pooling", "1_Pooling")],
                POOLING: {"pooling_mode": "mean"},
            },
            "mean",
        ),
        ({OPTIONS: {"do_lower_case": True}}, "do_lower_case"),
    ],
    ids=["mean", "dense", "own dense", "own pooling", "lower case"],
)
def test_what_is_spelled_out_counts_for_jina(tmp_path: Path, files: Files, named: str) -> None:
    """Another pooling mode or a Dense module is rejected, whatever the model type is."""
    write_checkpoint(tmp_path, QWEN)
    state(tmp_path, {**LAST, MODULES: listed(first="custom_st.Transformer")} | files)
    assert named in refusal(tmp_path)


def test_the_default_model_states_what_it_does() -> None:
    """The checkpoint in the package passes its own files."""
    assert (open_checkpoint(DEFAULT_MODEL).folder / POOLING).is_file()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["OwnBidirectionalModel"]}, "'OwnBidirectionalModel'"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "Qwen3ForSequenceClassification"),
        ({"architectures": "Qwen3Model"}, "architectures"),
        ({"is_causal": False}, "is_causal"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary"),
    ],
    ids=str,
)
def test_another_forward_pass_is_rejected(folder: Path, changes: Files, named: str) -> None:
    """A config that asks for another class, mask or rotation is rejected by name."""
    change_config(folder, changes)
    assert named in refusal(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["Qwen3ForCausalLM"]},
        {"architectures": None},
        {"is_causal": True},
        {"use_bidirectional_attention": False},
        {"partial_rotary_factor": 1.0},
        {"auto_map": {"AutoModel": "modeling_own.Qwen3Model"}},
    ],
    ids=str,
)
def test_the_same_forward_pass_is_accepted(folder: Path, changes: Files) -> None:
    """A config that states what taskvec computes is accepted."""
    change_config(folder, changes)
    assert read_checkpoint(folder, "m").backbone.causal


def state(folder: Path, files: Files) -> None:
    """Write JSON files; None deletes one."""
    for name, value in files.items():
        file = folder / name
        if file.is_symlink() or value is None:
            file.unlink(missing_ok=True)
        if value is not None:
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(value))


def sentence_transformer(folder: Path) -> Any:
    """Load a folder with sentence-transformers, which only this needs: it takes 80 MB."""
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415

    return SentenceTransformer(str(folder), device="cpu")


def save_modules(folder: Path, files: Files) -> None:
    """Write the modules with weights that modules.json lists."""
    from sentence_transformers.sentence_transformer.modules import Dense, LayerNorm  # noqa: PLC0415

    for entry in files.get(MODULES, ()):
        if entry["type"].endswith(("Dense", "LayerNorm")):
            made = Dense(16, 16) if entry["type"].endswith("Dense") else LayerNorm(16)
            torch.nn.init.normal_(next(made.parameters()))
            (folder / entry["path"]).mkdir()
            made.save(str(folder / entry["path"]))


def change_config(folder: Path, changes: Files) -> None:
    """Change values in config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | changes))


def last_token_vector(folder: Path) -> NDArray[np.float32]:
    """Return the normalised vector of the text, by the reference, without the statements."""
    backbone = folder / "backbone"
    backbone.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (backbone / name).symlink_to((folder / name).resolve())
    checkpoint: Checkpoint = read_checkpoint(backbone, "m")
    ids = np.array(Tokenizer.from_file(str(checkpoint.tokenizer)).encode(TEXT).ids, dtype=np.int32)
    (vector,) = reference_vectors(checkpoint, [ids], [None])
    unit: NDArray[np.float32] = vector / np.linalg.norm(vector)
    return unit


def refusal(folder: Path) -> str:
    """Return the message of the rejection, of one line."""
    with pytest.raises(CheckpointError) as refused:
        read_checkpoint(folder, "m")
    assert "\n" not in str(refused.value)
    return str(refused.value)
