"""The library with its tokenizer, compared with tokenizers, transformers and peft."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from oracle import Oracle
from qwen import VOCABULARY, qwen_tokenizer_file
from synthetic import ADAPTERS, TINY_SMALL, write_checkpoint
from taskvec import Embedder

DIFFERENCE = 1e-5
TASKS = {
    "retrieval.query": ("retrieval", "Query: "),
    "retrieval.passage": ("retrieval", "Document: "),
    "text-matching": ("text-matching", "Document: "),
    "clustering": ("clustering", "Document: "),
    "classification": ("classification", "Document: "),
}
TEXTS = [
    "hello",
    " hello",
    "What is the capital of France?",
    "Paris is the capital of France.",
    "你好世界。",
    "Größe, naïveté, e\u0301te\u0301",
    "def f(x):\n    return x ** 2\n",
    "👩‍👩‍👧 and 12345 things",
    "a word " * 150,
    "line\n\n\nbreaks \t and   spaces ",
    "a longer text that goes through fused attention, " * 40,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the layout of jina-embeddings-v5-text-small with its real tokenizer."""
    assert TINY_SMALL.vocabulary == VOCABULARY
    place = tmp_path_factory.mktemp("qwen") / "tiny-small"
    return write_checkpoint(place, TINY_SMALL, tokenizer=qwen_tokenizer_file(), seed=11)


@pytest.fixture(scope="module")
def embedder(folder: Path) -> Iterator[Embedder]:
    with Embedder(str(folder), dtype="float32", device="cpu") as embedder:
        yield embedder


@pytest.fixture(scope="module")
def oracle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(folder, "qwen3", ADAPTERS, tmp_path_factory.mktemp("oracle"))


@pytest.mark.parametrize("task", TASKS)
def test_vectors_equal_the_oracle(
    folder: Path, embedder: Embedder, oracle: Oracle, task: str
) -> None:
    """For every task, every component of the vectors equals the oracle's."""
    adapter, prompt = TASKS[task]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoded = [np.array(tokenizer.encode(prompt + text).ids, np.int32) for text in TEXTS]
    truth = np.stack([oracle.embed(ids, adapter) for ids in encoded])
    vectors = embedder.embed(TEXTS, task)
    assert vectors.shape == (len(TEXTS), TINY_SMALL.hidden)
    assert np.abs(vectors - truth).max() <= DIFFERENCE


def test_tasks_give_different_vectors(embedder: Embedder) -> None:
    """Vectors of different tasks differ, so that the comparison with the oracle tests tasks."""
    vectors = np.concatenate([embedder.embed(TEXTS[2], task) for task in TASKS])
    cosines = (vectors @ vectors.T)[~np.eye(len(TASKS), dtype=bool)]
    assert cosines.max() < 0.999


def test_the_tasks_of_the_checkpoint(embedder: Embedder) -> None:
    """The library has exactly the tasks that were compared."""
    assert embedder.tasks == list(TASKS)


@pytest.mark.parametrize("dimensions", [1, 32, 100])
def test_truncated_vectors_equal_the_oracle(
    folder: Path, embedder: Embedder, oracle: Oracle, dimensions: int
) -> None:
    """Fewer dimensions are the first of the full vector, normalised again."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = np.array(tokenizer.encode("Document: " + TEXTS[3]).ids, np.int32)
    start = oracle.embed(ids, "clustering")[:dimensions]
    vectors = embedder.embed(TEXTS[3], "clustering", dimensions)
    assert vectors.shape == (1, dimensions)
    scaled = start / np.linalg.norm(start)
    # normalising few values magnifies the difference of the full vector
    assert np.abs(vectors[0] - scaled).max() <= DIFFERENCE / np.linalg.norm(start)
