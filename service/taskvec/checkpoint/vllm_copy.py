"""A checkpoint as stock vLLM can serve it with an adapter per request.

vLLM reads jina_embeddings_v5 only by code from the checkpoint, and merges one task for the life of
the process. The same weights under the config of a plain architecture, with the adapters beside
them as LoRA requests, serve every task in one batch.
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
"""Read tokenizer.json as it is: a class chosen by the architecture's name may not fit it."""


def make_vllm_copy(checkpoint: Checkpoint, cache: Path) -> Path:
    """The folder to give vLLM as its model: weights and tokenizer linked, config rewritten.

    Args:
        checkpoint: stays as it is; its adapters are named by their own folders.
        cache: the folder is made in here, once for each state of the checkpoint; what of it is not
            as it should be, such as a link to a file that has moved, is written again.

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
        links = {name: file for name, file in links.items() if not _leads_to(folder / name, file)}
        texts = {name: text for name, text in texts.items() if not _holds(folder / name, text)}
        if links or texts:
            _write(folder, links, texts)
    except OSError as error:
        raise CheckpointError(
            f"vLLM needs a prepared copy of {checkpoint.card.name}, which cannot be written to "
            f"{folder} ({error.strerror}): set --cache-dir to a writable folder."
        ) from None
    return folder


def _leads_to(link: Path, file: Path) -> bool:
    return link.is_symlink() and link.readlink() == file


def _holds(file: Path, text: str) -> bool:
    return file.is_file() and file.read_text() == text


def _write(folder: Path, links: Mapping[str, Path], texts: Mapping[str, str]) -> None:
    """Put entries into a folder that others may read and write now: each at one stroke."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        unfinished.chmod(0o755)
        for name, file in links.items():
            (unfinished / name).symlink_to(file)
        for name, text in texts.items():
            (unfinished / name).write_text(text)
        if not folder.exists():
            with suppress(OSError):  # another process was faster
                unfinished.rename(folder)
                return
        for name in (*links, *texts):
            (unfinished / name).replace(folder / name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _linked_files(checkpoint: Checkpoint) -> list[Path]:
    weights = sorted({file for file, _ in checkpoint.weights.values()})
    index = checkpoint.folder / "model.safetensors.index.json"
    return [*weights, checkpoint.tokenizer, *([index] if index.is_file() else [])]


def vllm_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config.json of a plain architecture that vLLM and transformers know without extra code.

    EuroBERT has exactly Llama's weight names; vLLM's bidirectional Llama is its forward.
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
