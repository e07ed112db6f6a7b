"""A tiny teacher, data and recipe for tests: training takes a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel

TOPICS = {
    "ice": ["glacier", "snow", "frost", "berg", "cold", "melt"],
    "fire": ["flame", "ember", "smoke", "ash", "burn", "heat"],
    "code": ["compile", "loop", "stack", "byte", "parse", "shell"],
}
"""Words by topic: what the tiny models can learn."""

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def sentence(random: np.random.Generator, topic: str) -> str:
    """Return three to eight words of a topic."""
    return " ".join(random.choice(TOPICS[topic], random.integers(3, 9)))


def write_teacher(folder: Path) -> Path:
    """Write a random BERT of 48 dimensions with a WordPiece tokenizer and mean pooling."""
    words = [word for topic in TOPICS.values() for word in topic]
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + [":", "."]
    pieces = [*SPECIAL, "query", "document", *words, *letters, *(f"##{c}" for c in letters)]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, "never", "##seen"])}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token=SPECIAL[1]))
    tokenizer.normalizer = BertNormalizer()
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    BertModel(config).save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    pooling = {"pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


def write_data(folder: Path) -> Path:
    """Write texts, pairs with negatives, scored pairs and labelled texts, and a data card."""
    random = np.random.default_rng(0)
    topics = [*TOPICS] * 40
    labelled = [{"text": sentence(random, topic), "label": topic} for topic in topics]
    pairs = [
        {
            "anchor": sentence(random, topic),
            "positive": sentence(random, topic),
            "negatives": [sentence(random, other) for other in TOPICS if other != topic],
        }
        for topic in topics
    ]
    scored = [
        {
            "text_a": sentence(random, topic),
            "text_b": sentence(random, other),
            "score": float(topic == other),
        }
        for topic, other in zip(topics, random.permutation(topics), strict=True)
    ]
    write_records(folder / "texts.jsonl", [{"text": record["text"]} for record in labelled])
    write_records(folder / "held-out.jsonl", [{"text": sentence(random, t)} for t in topics[:20]])
    write_records(folder / "labelled.jsonl", labelled)
    write_records(folder / "pairs.jsonl", pairs)
    write_records(folder / "scored.jsonl", scored)
    (folder / "card.md").write_text("# Data card\n\nSentences that nobody said.\n")
    return folder


def write_records(file: Path, records: list[dict[str, Any]]) -> Path:
    """Write JSONL."""
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


RECIPE = """
name = "tiny"
seed = 1
dimensions = [16, 32]

[teacher]
model = "{teacher}"
batch_tokens = 1024

[student]
hidden = 32
layers = 2
heads = 2
kv_heads = 2
head_dim = 16
intermediate = 48
max_positions = 128

[[distill]]
name = "words"
texts = ["texts.jsonl"]
pairs = ["pairs.jsonl"]
held_out = ["held-out.jsonl"]
steps = 12
lr = 3e-3
embedding_lr = 1e-2
batch_tokens = 1024
similarity = 1.0
save_every = 6
log_every = 3

[[adapt]]
name = "retrieval"
loss = "retrieval"
pairs = ["pairs.jsonl"]
mine = {{count = 4, last = 40}}
hard_negatives = 2
steps = 24
lr = 2e-2
batch = 12
rank = 4
alpha = 4
save_every = 4
log_every = 4

[[adapt]]
name = "text-matching"
loss = "text-matching"
pairs = ["pairs.jsonl"]
scored = ["scored.jsonl"]
steps = 24
lr = 2e-2
batch = 12
rank = 4
alpha = 4
log_every = 4

[[adapt]]
name = "clustering"
loss = "clustering"
labelled = ["labelled.jsonl"]
centroid = 0.6
steps = 24
lr = 2e-2
batch = 12
rank = 4
alpha = 4
log_every = 4

[[adapt]]
name = "classification"
loss = "classification"
labelled = ["labelled.jsonl"]
steps = 24
lr = 2e-2
batch = 12
rank = 4
alpha = 4
log_every = 4

[export]
dtype = "float16"
rope_theta = 200000.0
summary = "Made by a test."
data = "Words in random order."
"""


def write_recipe(file: Path, teacher: Path) -> Path:
    """Write a recipe with all stages."""
    file.write_text(RECIPE.format(teacher=teacher))
    return file
