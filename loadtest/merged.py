"""A checkpoint that every server can read: one adapter merged into the weights, no prompts.

peft merges, so that no side measures with weights that our own code has made.

    python loadtest/merged.py mini FOLDER

writes the retrieval adapter of a shape and prints where.
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
"""What sentence-transformers, and so infinity, puts one after another."""


def merged_folder(checkpoint: Checkpoint, adapter: str, room: Path) -> Path:
    """A folder under ``room`` in the layout of transformers and of sentence-transformers.

    Args:
        checkpoint: one of a causal backbone.
        adapter: the name of the one that is merged, in bfloat16.
        room: an existing folder; what is made is named by the model.
    """
    folder = room / f"{checkpoint.folder.name}-{adapter}"
    base = AutoModel.from_pretrained(make_vllm_copy(checkpoint, room), dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, checkpoint.folder / "adapters" / adapter)
    model.merge_and_unload().save_pretrained(folder)
    shutil.copy(checkpoint.tokenizer, folder / "tokenizer.json")
    longest = checkpoint.card.max_tokens
    pooling = {
        "word_embedding_dimension": checkpoint.backbone.hidden,
        "pooling_mode_mean_tokens": False,
        "pooling_mode_lasttoken": True,
    }
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "[PAD]",
        "padding_side": "right",
        "model_max_length": longest,
    }
    kind = "sentence_transformers.models"
    places = ("", "1_Pooling", "2_Normalize")
    modules = [
        {"idx": i, "name": str(i), "path": place, "type": f"{kind}.{name}"}
        for i, (name, place) in enumerate(zip(MODULES, places, strict=True))
    ]
    for place, content in (
        ("config.json", vllm_config(checkpoint)),
        ("tokenizer_config.json", tokenizer),
        ("modules.json", modules),
        ("sentence_bert_config.json", {"max_seq_length": longest, "do_lower_case": False}),
        ("config_sentence_transformers.json", {"prompts": {}, "default_prompt_name": None}),
        ("1_Pooling/config.json", pooling),
    ):
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / place).write_text(json.dumps(content, indent=2) + "\n")
    return folder


if __name__ == "__main__":
    print(merged_folder(checkpoint_of(sys.argv[1]), "retrieval", Path(sys.argv[2])))
