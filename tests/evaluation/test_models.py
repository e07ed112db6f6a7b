"""A checkpoint in this process: its adapters, and its backbone without an adapter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from heldout import LABELLED
from synthetic import TINY_SMALL, write_checkpoint
from taskvec import Embedder
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.checkpoint.reference import reference_vectors
from taskvec.evaluation.models import LoadedModel, Sides, sides_of

TEXTS = [text for text, _ in LABELLED]


def test_base_is_the_backbone_without_adapter(default_checkpoint: Checkpoint) -> None:
    """`base` has the retrieval prompts and no adapter: its vectors are the numpy reference's."""
    tokenizer = Tokenizer.from_file(str(default_checkpoint.tokenizer))
    with Embedder(dtype="float32") as embedder:
        model = LoadedModel(embedder)
        for task, prompt in (("base.query", "query"), ("base.passage", "document")):
            advanced: list[int] = []
            vectors = model.embed(TEXTS[:3], task, advanced.append)
            texts = [default_checkpoint.prompts[prompt] + text for text in TEXTS[:3]]
            ids = [np.array(tokenizer.encode(text).ids, dtype=np.int32) for text in texts]
            truth = reference_vectors(default_checkpoint, ids, [None] * 3)
            assert np.abs(vectors - truth).max() <= 1e-4 * np.abs(truth).max()
            assert sum(advanced) == 3


def test_tasks_give_the_vectors_of_the_library() -> None:
    """Vectors are those of the library, truncated if too long and not normalised."""
    texts = [f"text {n}" for n in range(600)] + ["word " * 5000]
    with Embedder(dtype="float32") as embedder:
        model = LoadedModel(embedder)
        vectors = model.embed(texts, "clustering", lambda _: None)
        some = [0, 511, 512, 600]
        truth = embedder.embed(
            [texts[n] for n in some], "clustering", normalized=False, truncate=True
        )
        assert np.abs(vectors[some] - truth).max() <= 1e-4


@pytest.mark.parametrize(
    ("adapters", "tasks"),
    [
        ((), ["retrieval.query", "retrieval.passage"]),
        (("legal-search",), ["legal-search", "base"]),
        (("retrieval", "base"), ["retrieval.query", "retrieval.passage", "base"]),
    ],
    ids=["no adapter", "no retrieval", "an adapter of that name"],
)
def test_base_is_a_task_beside_the_adapters(
    tmp_path: Path, adapters: tuple[str, ...], tasks: list[str]
) -> None:
    """The backbone is one more task of a checkpoint with adapters, unless one is called `base`."""
    folder = write_checkpoint(
        tmp_path / "checkpoint", TINY_SMALL, jina=bool(adapters), adapters=adapters
    )
    with Embedder(str(folder), dtype="float32") as embedder:
        model = LoadedModel(embedder)
        assert model.tasks == tasks
        for task in model.tasks:
            assert model.embed(["a text"], task, lambda _: None).shape == (1, model.dimension)


@pytest.mark.parametrize(
    ("tasks", "sides"),
    [
        (["a.query", "a.passage", "b"], {"a": Sides("a.query", "a.passage"), "b": Sides("b", "b")}),
        (["embedding"], {"embedding": Sides("embedding", "embedding")}),
        (["legal.query"], {"legal.query": Sides("legal.query", "legal.query")}),
    ],
    ids=["two sides", "no adapter", "queries only"],
)
def test_tasks_are_grouped_by_adapter(tasks: list[str], sides: dict[str, Sides]) -> None:
    """Query and passage tasks are grouped to one adapter; any other task serves as both sides."""
    assert sides_of(tasks) == sides
