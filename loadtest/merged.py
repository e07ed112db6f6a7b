"""Write a checkpoint that every server can read: one adapter merged into the weights, no prompts.

peft merges the adapter, so that no server is measured with weights made by our own code.

    python loadtest/merged.py mini FOLDER

merges the retrieval adapter of a shape and prints the path of the checkpoint.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModel

from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.checkpoint.vllm_copy import make_vllm_copy, vllm_config
from workload import checkpoint_of

MODULES = ("Transformer", "Pooling", "Normalize")
"""Modules of a sentence-transformers model, in order; infinity reads the same format."""


def merged_folder(checkpoint: Checkpoint, adapter: str, workdir: Path) -> Path:
    """Write a folder in the formats of transformers and sentence-transformers.

    Args:
        checkpoint: checkpoint with a causal backbone.
        adapter: name of the adapter, merged in bfloat16.
        workdir: existing folder, in which the new one is created.

    Returns:
        The new folder.
    """
    folder = workdir / f"{checkpoint.folder.name}-{adapter}"
    base = AutoModel.from_pretrained(make_vllm_copy(checkpoint, workdir), dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, checkpoint.folder / "adapters" / adapter)
    model.merge_and_unload().save_pretrained(folder)
    shutil.copy(checkpoint.tokenizer, folder / "tokenizer.json")
    max_tokens = checkpoint.card.max_tokens
    pooling = {
        "word_embedding_dimension": checkpoint.backbone.hidden,
        "pooling_mode_mean_tokens": False,
        "pooling_mode_lasttoken": True,
    }
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "[PAD]",
        "padding_side": "right",
        "model_max_length": max_tokens,
    }
    kind = "sentence_transformers.models"
    paths = ("", "1_Pooling", "2_Normalize")
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"{kind}.{name}"}
        for i, (name, path) in enumerate(zip(MODULES, paths, strict=True))
    ]
    for path, content in (
        ("config.json", vllm_config(checkpoint)),
        ("tokenizer_config.json", tokenizer),
        ("modules.json", modules),
        ("sentence_bert_config.json", {"max_seq_length": max_tokens, "do_lower_case": False}),
        ("config_sentence_transformers.json", {"prompts": {}, "default_prompt_name": None}),
        ("1_Pooling/config.json", pooling),
    ):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(json.dumps(content, indent=2) + "\n")
    return folder


if __name__ == "__main__":
    print(merged_folder(checkpoint_of(sys.argv[1]), "retrieval", Path(sys.argv[2])))
