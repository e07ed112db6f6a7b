"""What the files of sentence-transformers in a checkpoint state about its vectors.

taskvec computes the hidden state of the last token, and can normalise it. A checkpoint whose files
ask for anything else is rejected: its vectors would be wrong, and nothing else would show it.
The names of files, modules and fields are those of sentence-transformers 6.2 and of the versions
before it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from taskvec.checkpoint.files import (
    PROMPTS_FILE,
    is_file,
    list_folder,
    read_json,
    read_json_list,
)
from taskvec.errors import CheckpointError

MODULES_FILE = "modules.json"

_TRANSFORMER_FILES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""Files with the options of the Transformer module; the first one that is not empty counts."""

_NO_EFFECT = frozenset({"Normalize", "Dropout"})
"""Modules that change no vector: dropout is for training, and clients choose the length."""

_OTHER_MODULES = frozenset(
    {
        "Asym",
        "BoW",
        "CLIPModel",
        "CNN",
        "Dense",
        "LSTM",
        "LayerNorm",
        "Router",
        "StaticEmbedding",
        "WeightedLayerPooling",
        "WordEmbeddings",
        "WordWeights",
    }
)
"""Further modules of sentence-transformers, which change vectors."""

_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Field of a pooling config before sentence-transformers 6 -> the mode."""

_ALLOWED_VALUES: dict[str, tuple[Any, ...]] = {
    "transformer_task": ("feature-extraction",),
    "module_output_name": ("token_embeddings",),
}
"""Options of the Transformer module that are names -> the names that taskvec implements."""

_ARGUMENTS = tuple(
    f"{kind}_{suffix}"
    for kind in ("model", "tokenizer", "processor", "config")
    for suffix in ("args", "kwargs")
)
"""Options of the Transformer module that hold arguments for transformers."""

_HARMLESS_ARGUMENTS = frozenset(
    {
        "attn_implementation",
        "cache_dir",
        "code_revision",
        "device_map",
        "dtype",
        "local_files_only",
        "low_cpu_mem_usage",
        "max_length",
        "model_max_length",
        "padding",
        "padding_side",
        "return_tensors",
        "revision",
        "token",
        "torch_dtype",
        "trust_remote_code",
        "truncation",
        "use_cache",
        "use_fast",
        "use_safetensors",
    }
)
"""Arguments that do not change the vector of a text that is short enough."""

_HARMLESS_OPTIONS = frozenset({"max_seq_length", "unpad_inputs", *_ALLOWED_VALUES})
"""Options that are checked elsewhere, or change no vector."""

_NUMBERED_FOLDER = re.compile(r"\d+_(?P<name>\w+)")


class _Module(NamedTuple):
    """One entry of modules.json.

    Attributes:
        type: the class, with its package.
        name: the name of the class.
        path: its folder, relative to the checkpoint.
        own: True if the class is code of the checkpoint, not of sentence-transformers.
    """

    type: str
    name: str
    path: str
    own: bool


def check_pooling(folder: Path, model_type: object) -> int | None:
    """Check that the files of sentence-transformers ask for the vectors that taskvec computes.

    Args:
        folder: the checkpoint.
        model_type: that of config.json. The code of a ``jina_embeddings_v5`` repository is known
            to pool the last token, so that classes of its own are accepted there; a module or a
            pooling mode that is spelled out is not.

    Returns:
        The longest text in tokens that the files state; None if they state none.

    Raises:
        CheckpointError: a file is damaged, or asks for vectors that taskvec does not compute.
    """
    _check_model_type(folder / PROMPTS_FILE)
    modules_file = folder / MODULES_FILE
    jina = model_type == "jina_embeddings_v5"
    if is_file(modules_file):
        modules = list(_read_modules(modules_file))
    else:  # other servers read the folders of the modules without the list
        modules = list(_modules_in_folders(folder))
    for module in modules:
        _check_module(folder, module, trusts_own=jina)
    own = any(module.own for module in modules)
    return _max_tokens(folder, own=own)


def _check_model_type(file: Path) -> None:
    if not is_file(file):
        return
    stated = read_json(file).get("model_type")
    if stated not in (None, "", "SentenceTransformer"):
        raise CheckpointError(
            f"{file} says that this is a {stated!r} model: taskvec serves models with one vector "
            "per text ('SentenceTransformer')."
        )


def _read_modules(file: Path) -> Iterator[_Module]:
    for entry in read_json_list(file):
        if not isinstance(entry, dict) or not isinstance(entry.get("type"), str):
            raise CheckpointError(f"{file}: each module must be an object with a type.")
        path = entry.get("path") or ""
        if not isinstance(path, str) or Path(path).is_absolute() or ".." in Path(path).parts:
            raise CheckpointError(f"{file}: the path {path!r} is not one inside the checkpoint.")
        package, _, name = entry["type"].rpartition(".")
        own = package.partition(".")[0] != "sentence_transformers"
        yield _Module(entry["type"], name, path, own)


def _modules_in_folders(folder: Path) -> Iterator[_Module]:
    for path in list_folder(folder):
        match = _NUMBERED_FOLDER.fullmatch(path.name)
        if match and (match["name"] == "Pooling" or match["name"] in _OTHER_MODULES):
            config = path / "config.json"
            if is_file(config):
                yield _Module(match["name"], match["name"], path.name, own=False)


def _check_module(folder: Path, module: _Module, *, trusts_own: bool) -> None:
    where = f"{folder / MODULES_FILE} lists {module.type}"
    if module.name == "Pooling" and (trusts_own or not module.own):
        _check_pooling_modes(folder / module.path / "config.json", optional=module.own)
    elif module.name in _OTHER_MODULES:
        raise CheckpointError(
            f"{folder / module.path} is a {module.name} module, which taskvec does not implement: "
            "without it the vectors would be wrong."
        )
    elif module.own:
        if not trusts_own:
            raise CheckpointError(
                f"{where}, which is code of the checkpoint: taskvec never runs such code, and "
                "cannot know which vectors it gives."
            )
    elif module.name == "Transformer":
        if Path(module.path) != Path():
            raise CheckpointError(
                f"{where} in the folder {module.path}: taskvec reads the weights beside "
                f"{MODULES_FILE} only."
            )
    elif module.name not in _NO_EFFECT:
        raise CheckpointError(f"{where}, which taskvec does not implement.")


def _check_pooling_modes(file: Path, *, optional: bool) -> None:
    if optional and not is_file(file):
        return
    config = read_json(file)
    modes = _pooling_modes(config)
    if modes != ["lasttoken"] and (modes or not optional):
        stated = " and ".join(map(str, modes)) or "none, which means mean"
        raise CheckpointError(
            f"{file} states the pooling mode {stated}: taskvec implements only lasttoken."
        )


def _pooling_modes(config: Mapping[str, Any]) -> list[Any]:
    stated = config.get("pooling_mode")
    if stated is not None:
        return list(stated) if isinstance(stated, list) else [stated]
    modes = [mode for flag, mode in _POOLING_FLAGS.items() if config.get(flag)]
    if not modes and any(flag in config for flag in _POOLING_FLAGS):
        return ["mean"]  # the default if every mode is switched off
    return modes


def _max_tokens(folder: Path, *, own: bool) -> int | None:
    """Check the options of the Transformer module; return the longest text in tokens."""
    for file in (folder / name for name in _TRANSFORMER_FILES):
        config = read_json(file) if is_file(file) else {}
        if not config:
            continue
        if config.get("do_lower_case"):
            raise CheckpointError(f"{file} sets do_lower_case, which taskvec does not implement.")
        if own:  # the options belong to code of the checkpoint
            return None
        return _check_options(config, file)
    return None


def _check_options(config: Mapping[str, Any], file: Path) -> int | None:
    """Check the options that sentence-transformers' own Transformer module has."""
    for name, allowed in _ALLOWED_VALUES.items():
        if config.get(name) is not None and config[name] not in allowed:
            raise CheckpointError(
                f"{file} sets {name} to {config[name]!r}: taskvec implements only "
                f"{', '.join(map(repr, allowed))}."
            )
    lengths = [config.get("max_seq_length")]
    for name, value in config.items():
        if name in _HARMLESS_OPTIONS or value in (None, False, "", [], {}):
            continue
        if name == "modality_config":
            _check_modality(value, file)
        elif name in _ARGUMENTS:
            lengths.append(_check_arguments(value, f"{file}: {name}"))
        elif name == "processing_kwargs":
            lengths.append(_check_processing(value, f"{file}: {name}"))
        else:
            raise CheckpointError(f"{file} sets {name}, which taskvec does not implement.")
    return _smallest(lengths, str(file))


def _check_processing(arguments: object, where: str) -> object:
    """Check the arguments of each call of the tokenizer; return the longest text in tokens."""
    if not isinstance(arguments, dict):
        raise CheckpointError(f"{where} must be an object.")
    kinds = [kind for kind in ("common", "text") if arguments.get(kind)]
    return _smallest(
        [_check_arguments(arguments[kind], f"{where}.{kind}") for kind in kinds], where
    )


def _smallest(lengths: Iterable[object], where: str) -> int | None:
    """Return the smallest of some lengths in tokens; None is no limit."""
    stated = []
    for length in lengths:
        if type(length) is int and length > 0:
            stated.append(length)
        elif length is not None:
            raise CheckpointError(
                f"{where} has a length that is not a positive integer: {length!r}."
            )
    return min(stated, default=None)


def _check_modality(config: object, file: Path) -> None:
    text = config.get("text") if isinstance(config, dict) else None
    if not isinstance(text, dict):
        raise CheckpointError(f"{file}: modality_config has no entry for text.")
    stated = text.get("method"), text.get("method_output_name")
    if stated != ("forward", "last_hidden_state"):
        raise CheckpointError(
            f"{file}: modality_config makes vectors from {stated[0]!r} and {stated[1]!r}: taskvec "
            "implements only 'forward' and 'last_hidden_state'."
        )


def _check_arguments(arguments: object, where: str) -> object:
    """Check arguments for transformers; return the longest text in tokens, if they state one."""
    if not isinstance(arguments, dict):
        raise CheckpointError(f"{where} must be an object.")
    for name, value in arguments.items():
        if name not in _HARMLESS_ARGUMENTS and value is not None:
            raise CheckpointError(f"{where} sets {name}, which taskvec does not implement.")
    length: object = arguments.get("model_max_length", arguments.get("max_length"))
    return None if isinstance(length, float) else length  # 1e30 stands for no limit
