"""A copy of a checkpoint that stock vLLM can serve with one LoRA adapter per request.

vLLM can load jina_embeddings_v5 only with code from the checkpoint, which merges one task into the
weights. With the config of a standard architecture, vLLM loads the same weights without that code
and applies the adapters as LoRA requests, so that one batch can contain every task.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.checkpoint.golden import fingerprint
from taskvec.errors import CheckpointError

_TOKENIZER_CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast"}
"""Loads tokenizer.json unchanged; the class that belongs to the architecture may not match it."""


def make_vllm_copy(checkpoint: Checkpoint, cache: Path) -> Path:
    """Create the folder that vLLM loads as its model: symlinks to the weights, and a new config.

    The folder is created once per state of the checkpoint files. Entries that are wrong, such as a
    link to a file that has moved, are written again.

    Args:
        checkpoint: the original, which is not changed.
        cache: parent of the folder.

    Returns:
        The folder. Adapters are not part of it: vLLM loads them from the checkpoint.

    Raises:
        CheckpointError: the cache cannot be written.
    """
    folder = cache / "plain" / fingerprint(checkpoint)
    links = {file.name: file.resolve() for file in _linked_files(checkpoint)}
    texts = {
        "config.json": json.dumps(vllm_config(checkpoint), indent=2) + "\n",
        "tokenizer_config.json": json.dumps(_TOKENIZER_CONFIG, indent=2) + "\n",
    }
    try:
        links = {name: file for name, file in links.items() if not _links_to(folder / name, file)}
        texts = {name: text for name, text in texts.items() if not _contains(folder / name, text)}
        if links or texts:
            _write(folder, links, texts)
    except OSError as error:
        raise CheckpointError(
            f"vLLM needs a prepared copy of {checkpoint.card.name}, which cannot be written to "
            f"{folder} ({error.strerror}): set --cache-dir to a writable folder."
        ) from None
    return folder


def _links_to(link: Path, file: Path) -> bool:
    return link.is_symlink() and link.readlink() == file


def _contains(file: Path, text: str) -> bool:
    return file.is_file() and file.read_text() == text


def _write(folder: Path, links: Mapping[str, Path], texts: Mapping[str, str]) -> None:
    """Write each entry atomically, because other processes may read or write the folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        temporary.chmod(0o755)
        for name, file in links.items():
            (temporary / name).symlink_to(file)
        for name, text in texts.items():
            (temporary / name).write_text(text)
        if not folder.exists():
            with suppress(OSError):  # another process was faster
                temporary.rename(folder)
                return
        for name in (*links, *texts):
            (temporary / name).replace(folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _linked_files(checkpoint: Checkpoint) -> list[Path]:
    weights = sorted({file for file, _ in checkpoint.weights.values()})
    index = checkpoint.folder / "model.safetensors.index.json"
    return [*weights, checkpoint.tokenizer, *([index] if index.is_file() else [])]


def vllm_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return a config.json with an architecture that vLLM and transformers have built in.

    EuroBERT has the weight names of Llama, and vLLM's bidirectional Llama computes the same.
    """
    backbone = checkpoint.backbone
    config: dict[str, Any] = {
        "attention_bias": False,
        "dtype": "bfloat16",
        "head_dim": backbone.head_dim,
        "hidden_act": "silu",
        "hidden_size": backbone.hidden,
        "intermediate_size": backbone.intermediate,
        "max_position_embeddings": backbone.max_positions,
        "num_attention_heads": backbone.heads,
        "num_hidden_layers": backbone.layers,
        "num_key_value_heads": backbone.kv_heads,
        "rms_norm_eps": backbone.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": backbone.rope_theta},
        "rope_theta": backbone.rope_theta,
        "tie_word_embeddings": True,
        "vocab_size": backbone.vocabulary,
    }
    if backbone.causal:
        return config | {"architectures": ["Qwen3Model"], "model_type": "qwen3"}
    return config | {
        "architectures": ["LlamaBidirectionalModel"],
        "model_type": "llama",
        "is_causal": False,
        "mlp_bias": False,
        "pooling": "last",
    }
