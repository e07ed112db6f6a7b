"""``from taskvec import Embedder``: the same vectors as from the server, in this process."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import taskvec
from taskvec import Embedder
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.checkpoint.open import DEFAULT_MODEL
from taskvec.errors import (
    CheckpointError,
    InvalidRequestError,
    TaskvecError,
    UnavailableError,
)

TASKS = ["retrieval.query", "retrieval.passage", "text-matching", "clustering", "classification"]
TEXTS = [
    "The cat sat on the mat.",
    "Eine Katze saß auf der Matte.",
    "x",
    "Stock markets fell. " * 40,
]
BF16_DIFFERENCE = 1e-3
FP32_DIFFERENCE = 1e-5
"""Documented maximum difference per component between batches."""


@pytest.fixture(scope="module")
def embedder() -> Iterator[Embedder]:
    """Load the default model with the default options."""
    with Embedder() as loaded:
        yield loaded


def test_vectors_are_float32_rows_of_length_one(embedder: Embedder) -> None:
    """The result is float32 [texts, dimension], each row of length 1."""
    vectors = embedder.embed(TEXTS)
    assert vectors.shape == (len(TEXTS), embedder.model.dimension)
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(len(TEXTS)), abs=1e-6)


def test_vectors_belong_to_the_caller(embedder: Embedder) -> None:
    """A result is writable, and later calls do not change it."""
    first = embedder.embed("a text")
    copy = first.copy()
    embedder.embed("another text")
    assert np.array_equal(first, copy)
    first[0] = 0


@pytest.mark.parametrize("sequence", [list, tuple, np.array], ids=["list", "tuple", "array"])
def test_one_text_is_a_sequence_of_one(embedder: Embedder, sequence: Any) -> None:
    """A string and a sequence of that string give the same row."""
    alone = embedder.embed("a text")
    assert alone.shape == (1, embedder.model.dimension)
    assert difference(alone, embedder.embed(sequence(["a text"]))) <= BF16_DIFFERENCE


def test_no_texts_give_no_rows(embedder: Embedder) -> None:
    """An empty list gives an array of zero rows with the right width."""
    vectors = embedder.embed([], dimensions=64)
    assert (vectors.shape, vectors.dtype) == ((0, 64), np.float32)
    assert embedder.embed([]).shape == (0, embedder.model.dimension)


@pytest.mark.parametrize("dimensions", [1, 7, 64, 256])
def test_dimensions_cut_and_normalise_again(embedder: Embedder, dimensions: int) -> None:
    """``dimensions`` keeps the first values of the full vector and scales them to length 1."""
    full = embedder.embed(TEXTS)[:, :dimensions]
    vectors = embedder.embed(TEXTS, dimensions=dimensions)
    assert vectors.shape == (len(TEXTS), dimensions)
    expected = full / np.linalg.norm(full, axis=1, keepdims=True)
    near = BF16_DIFFERENCE / np.linalg.norm(full, axis=1).min()
    assert difference(vectors, expected) <= near


def test_unnormalised_vectors_have_the_same_direction(embedder: Embedder) -> None:
    """normalized=False returns vectors with the lengths that the model gives."""
    vectors = embedder.embed(TEXTS, normalized=False)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    assert (np.abs(lengths - 1) > 0.01).all()
    assert difference(vectors / lengths, embedder.embed(TEXTS)) <= BF16_DIFFERENCE


def test_tasks_are_those_of_the_model(embedder: Embedder) -> None:
    """``tasks`` lists the names for ``task=``, and each task gives different vectors."""
    assert sorted(embedder.tasks) == sorted(TASKS)
    vectors = np.concatenate([embedder.embed("a text", task) for task in embedder.tasks])
    cosines = vectors @ vectors.T - np.eye(len(TASKS))
    assert cosines.max() < 0.999


@pytest.mark.parametrize(
    ("alias", "task"),
    [(None, "text-matching"), ("retrieval", "retrieval.passage"), ("separation", "clustering")],
)
def test_aliases_mean_their_task(embedder: Embedder, alias: str | None, task: str) -> None:
    """An alias, or no task, gives the vectors of the task it stands for."""
    assert difference(embedder.embed(TEXTS, alias), embedder.embed(TEXTS, task)) <= BF16_DIFFERENCE


def test_an_unknown_task_is_refused(embedder: Embedder) -> None:
    """An unknown task is rejected with a list of the known ones."""
    with pytest.raises(InvalidRequestError, match=r"'poetry'.*retrieval\.query") as refused:
        embedder.embed("a text", task="poetry")
    assert refused.value.code == "unknown_task"


def test_a_task_may_be_a_prompt_and_an_adapter(embedder: Embedder) -> None:
    """``Embedder.task`` returns a Task, which can be changed and passed to ``embed``."""
    task = embedder.task("retrieval.query")
    assert (task.adapter, task.prompt) == ("retrieval", "Query: ")
    queries = embedder.embed(TEXTS, "retrieval.query")
    assert difference(embedder.embed(TEXTS, task), queries) <= BF16_DIFFERENCE
    other = replace(task, prompt=embedder.task("retrieval.passage").prompt)
    passages = embedder.embed(TEXTS, "retrieval.passage")
    assert difference(embedder.embed(TEXTS, other), passages) <= BF16_DIFFERENCE
    bare = embedder.embed(TEXTS, replace(task, adapter=None))
    assert (bare * queries).sum(axis=1).max() < 0.999


def test_each_text_may_have_its_task(embedder: Embedder) -> None:
    """A sequence of tasks gives each text the vector that it has alone; their order is kept."""
    own = replace(embedder.task("clustering"), prompt="Mine: ")
    tasks = ["retrieval.query", None, own, "separation"]
    vectors = embedder.embed(TEXTS, tasks, 64)
    alone = [embedder.embed(text, task, 64) for text, task in zip(TEXTS, tasks, strict=True)]
    assert difference(vectors, np.concatenate(alone)) <= 2 * BF16_DIFFERENCE
    same = embedder.embed(TEXTS, tuple(["clustering"] * len(TEXTS)))
    assert difference(same, embedder.embed(TEXTS, "clustering")) <= BF16_DIFFERENCE
    assert embedder.embed("a", ["clustering"]).shape == (1, 256)
    assert embedder.embed([], []).shape == (0, 256)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["clustering"], "task has 1 entries and texts 2"),
        ([], "task has 0 entries and texts 2"),
        (["clustering", "poetry"], r"'poetry' for task\[1\]: this model has"),
        (["clustering", 3], r"task\[1\] must be a task's name or a Task, got int"),
    ],
)
def test_wrong_tasks_name_their_position(
    embedder: Embedder, tasks: list[Any], message: str
) -> None:
    """A wrong task, or another number of them than of texts, is refused by its position."""
    with pytest.raises(InvalidRequestError, match=message):
        embedder.embed(["a", "b"], tasks)


def test_errors_name_the_text_among_several_tasks(embedder: Embedder) -> None:
    """A text that is too long is named by its index in the call, whatever tasks are around it."""
    tasks = ["clustering", "retrieval.query", "clustering", "retrieval.query"]
    with pytest.raises(InvalidRequestError, match=r"input\[3\]"):
        embedder.embed(["a", "b", "c", "word " * 5000], tasks)


@pytest.mark.parametrize("texts", ["a", []], ids=["one", "none"])
@pytest.mark.parametrize("dimensions", [0, -1, 257])
def test_impossible_dimensions_are_refused(embedder: Embedder, texts: Any, dimensions: int) -> None:
    """Dimensions out of range are rejected with the range, even for an empty list."""
    with pytest.raises(InvalidRequestError, match="between 1 and 256"):
        embedder.embed(texts, dimensions=dimensions)


@pytest.mark.parametrize(
    ("texts", "named"),
    [("", r"\[0\]"), (["a", ""], r"\[1\]"), (["a", "b", None], r"\[2\]"), ([b"a"], r"\[0\]")],
)
def test_an_invalid_text_is_refused(embedder: Embedder, texts: Any, named: str) -> None:
    """An empty text, or a value of another type, is rejected with its index."""
    with pytest.raises(InvalidRequestError, match=named):
        embedder.embed(texts)


def test_a_text_without_a_finite_vector_is_named(
    tmp_path: Path, default_checkpoint: Checkpoint
) -> None:
    """One damaged row of the embedding table fails its own text with its index, and no other."""
    folder = tmp_path / "damaged"
    shutil.copytree(default_checkpoint.folder, folder)
    texts = [f"text number {n}" for n in range(32)]
    encode = Tokenizer.from_file(str(default_checkpoint.tokenizer)).encode
    others = {id_ for text in texts for id_ in encode(f"Document: {text}").ids}
    (only, *_) = set(encode("Document: zebra").ids) - others
    weights = load_file(folder / "model.safetensors")
    (name,) = (key for key in weights if key.endswith("embed_tokens.weight"))
    weights[name][only] = torch.nan
    save_file(weights, folder / "model.safetensors")
    with Embedder(str(folder)) as embedder:
        assert np.isfinite(embedder.embed(texts)).all()
        with pytest.raises(TaskvecError, match=r"input\[17\]") as refused:
            embedder.embed([*texts[:17], "zebra", *texts[18:]])
        assert (refused.value.code, refused.value.param) == ("vector_not_finite", "input[17]")
        assert np.isfinite(embedder.embed(texts)).all()


def test_a_long_text_is_refused_or_cut(embedder: Embedder) -> None:
    """A text that is too long is rejected with its index; truncate=True embeds its beginning."""
    words = "word " * 5000
    with pytest.raises(InvalidRequestError, match=r"\[1\].*2048 tokens") as refused:
        embedder.embed(["short", words])
    assert refused.value.code == "input_too_long"
    cut = embedder.embed(["short", words], truncate=True)
    other_end = embedder.embed(words + "and another end", truncate=True)
    assert difference(cut[1:], other_end) <= BF16_DIFFERENCE
    assert difference(cut[:1], embedder.embed("short")) <= BF16_DIFFERENCE


def test_the_server_gives_the_same_vectors(embedder: Embedder, server_url: str) -> None:
    """Library and server agree on every task, with fewer dimensions."""
    for task in TASKS:
        body = {"input": TEXTS, "task": task, "dimensions": 100}
        data = httpx.post(f"{server_url}/v1/embeddings", json=body, timeout=60).json()["data"]
        served = np.array([entry["embedding"] for entry in data])
        assert difference(served, embedder.embed(TEXTS, task, 100)) <= BF16_DIFFERENCE


def test_threads_share_an_embedder(embedder: Embedder) -> None:
    """Concurrent calls from many threads each get the vectors of their own texts."""
    texts = [f"text number {n} " + "word " * (n % 20) for n in range(64)]
    truth = np.concatenate([embedder.embed(text, TASKS[n % 5]) for n, text in enumerate(texts)])
    with ThreadPoolExecutor(16) as threads:
        answers = threads.map(lambda n: embedder.embed(texts[n], TASKS[n % 5]), range(64))
        vectors = np.concatenate(list(answers))
    cosines = vectors @ truth.T
    assert np.diag(cosines).min() > 0.9995
    assert (cosines.argmax(axis=1) == np.arange(64)).all(), "a thread got another's vector"


def test_adapter_modes_agree() -> None:
    """Merged weights and low-rank factors give the same vectors in float32."""
    with (
        Embedder(dtype="float32", adapter_mode="merged") as merged,
        Embedder(dtype="float32", adapter_mode="low-rank") as low_rank,
    ):
        for task in TASKS:
            apart = difference(merged.embed(TEXTS, task), low_rank.embed(TEXTS, task))
            assert apart <= FP32_DIFFERENCE


def test_number_types_agree(embedder: Embedder) -> None:
    """The number type that ``auto`` selects gives nearly the vectors of float32."""
    with Embedder(dtype="float32") as exact:
        for task in TASKS:
            cosines = (exact.embed(TEXTS, task) * embedder.embed(TEXTS, task)).sum(axis=1)
            assert cosines.min() > 0.999


def test_float32_vectors_do_not_depend_on_the_batch() -> None:
    """A text's float32 vector is the same alone and in a batch with others."""
    with Embedder(dtype="float32") as exact:
        alone = np.concatenate([exact.embed(text) for text in TEXTS])
        assert difference(alone, exact.embed(TEXTS)) <= FP32_DIFFERENCE


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ({"text": "a"}, {}, "texts must be a text or a list of texts, got dict"),
        ({"a"}, {}, "texts must be a text or a list of texts, got set"),
        ("a", {"truncate": "no"}, "truncate must be True or False, got 'no'"),
        ("a", {"normalized": 1}, "normalized must be True or False, got 1"),
        ("a", {"dimensions": True}, "dimensions must be a whole number, got True"),
        ("a", {"dimensions": "8"}, "dimensions must be a whole number, got '8'"),
    ],
)
def test_wrong_arguments(
    embedder: Embedder, texts: Any, options: dict[str, Any], message: str
) -> None:
    """An argument of another type is an error, not another result."""
    with pytest.raises(InvalidRequestError, match=re.escape(message)):
        embedder.embed(texts, **options)


def test_dimensions_from_numpy(embedder: Embedder) -> None:
    """A numpy integer is a number of dimensions."""
    assert embedder.embed("a", dimensions=np.int64(8)).shape == (1, 8)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "foo"}, "dtype must be one of auto, bfloat16, float16, float32, got 'foo'"),
        ({"adapter_mode": "x"}, "adapter_mode must be one of auto, merged, low-rank, got 'x'"),
        ({"threads": -1}, "threads must be a whole number of at least 0, got -1"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    """An option with none of its values is an error that lists them."""
    with pytest.raises(ValueError, match=re.escape(message)):
        Embedder(**options)


def test_closing_ends_it() -> None:
    """After ``close``, which may be called twice, ``embed`` raises and does not block."""
    closed = Embedder()
    assert closed.embed("a text").shape == (1, closed.model.dimension)
    closed.close()
    closed.close()
    assert closed.model.name == DEFAULT_MODEL
    with pytest.raises((RuntimeError, UnavailableError)):
        closed.embed("a text")


def test_closing_finishes_running_calls() -> None:
    """A call that another thread made before ``close`` returns its vectors."""
    closing = Embedder()
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(closing.embed, ["word " * 100] * 64)
        while closing._embedder._admission.tokens == 0 and not answer.done():
            time.sleep(0.001)
        closing.close()
        assert answer.result().shape == (64, closing.model.dimension)


def test_closing_finishes_calls_that_are_being_tokenised() -> None:
    """So does one whose texts the tokenizer has not finished."""
    closing = Embedder()
    texts = [" ".join(["a" * 120] * 60)] * 400  # many characters, few tokens
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(closing.embed, texts)
        queue = closing._embedder._tokenizer._queue
        while not any(one.characters for one in queue._classes.values()) and not answer.done():
            time.sleep(0.001)
        closing.close()
        assert answer.result(60).shape == (400, closing.model.dimension)


def test_a_damaged_model_is_refused(tmp_path: Path) -> None:
    """A folder without a checkpoint raises CheckpointError."""
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        Embedder(str(tmp_path))


@pytest.mark.parametrize("module", ["torch", "fastapi", "uvicorn", "transformers", "pydantic"])
def test_importing_taskvec_is_cheap(module: str) -> None:
    """``import taskvec`` imports neither the engine nor the server."""
    code = f"import sys, taskvec; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


@pytest.mark.parametrize("module", ["fastapi", "starlette", "uvicorn", "transformers"])
def test_embedding_needs_no_server(module: str) -> None:
    """``Embedder`` imports neither a web framework nor transformers."""
    code = (
        "import sys\nfrom taskvec import Embedder\n"
        "with Embedder() as embedder: embedder.embed('a text')\n"
        f"sys.exit({module!r} in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_the_package_has_no_other_names() -> None:
    """An unknown attribute of ``taskvec`` raises AttributeError, as in any module."""
    with pytest.raises(AttributeError, match="Embeder"):
        _ = taskvec.Embeder


def difference(left: NDArray[Any], right: NDArray[Any]) -> float:
    """Return the largest absolute difference of any component."""
    assert left.shape == right.shape
    return float(np.abs(left - right).max())
