"""Text to ids: prompt and text as one string, special tokens kept, limits exact."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import examples
from qwen import VOCABULARY
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.core.tokenizer import TextTokenizer
from taskvec.errors import CheckpointError, InvalidRequestError
from tokenizing import ours, theirs

GOLDEN = [
    ("Query: ", "hello", [2859, 25, 23811]),
    ("Document: ", "hello", [7524, 25, 23811]),
    (
        "Query: ",
        "What is the capital of France?",
        [2859, 25, 3555, 374, 279, 6722, 315, 9625, 30],
    ),
    (
        "Document: ",
        "Paris is the capital of France.",
        [7524, 25, 12095, 374, 279, 6722, 315, 9625, 13],
    ),
    ("Document: ", "你好", [7524, 25, 220, 108386]),
    ("Document: ", " hello", [7524, 25, 220, 23811]),
]
"""What jina-embeddings-v5-text-small is fed; its tokenizer.json is Qwen3's."""


def whole(file: Path, text: str, max_tokens: int | None = None) -> list[int]:
    """What tokenizers gives when it reads all of the text, then cuts."""
    ids: list[int] = theirs(file, max_tokens).encode(text).ids
    return ids


def cut(file: Path, text: str, max_tokens: int, *, prompt: str = "") -> list[int]:
    (ids,) = ours(file, max_tokens).encode_now([text], prompt=prompt, truncate=True)
    assert ids.dtype == "int32"
    return list(map(int, ids))


@pytest.mark.parametrize(("prompt", "text", "ids"), GOLDEN)
def test_golden_ids(qwen_tokenizer: Path, prompt: str, text: str, ids: list[int]) -> None:
    """Prompt and text become the ids that the reference implementation feeds its model."""
    (given_ids,) = ours(qwen_tokenizer, 64).encode_now([text], prompt=prompt, truncate=False)
    assert given_ids.tolist() == ids


def test_the_post_processor_of_the_checkpoint_runs(file: Path) -> None:
    """What the checkpoint's own post-processor appends is there, and nothing else."""
    (ids,) = ours(file, 64).encode_now(["hello"], prompt="Query: ", truncate=False)
    assert ids.tolist() == whole(file, "Query: hello")


@settings(max_examples=examples(100))
@given(text=st.text(min_size=1, max_size=200), prompt=st.sampled_from(["", "Document: "]))
def test_a_short_text_is_tokenised_with_its_prompt_as_one_string(
    file: Path, text: str, prompt: str
) -> None:
    """Prompt and text are joined before they are tokenised."""
    expected = whole(file, prompt + text)
    if expected == whole(file, prompt):
        with pytest.raises(InvalidRequestError):
            ours(file, 8192).encode_now([text], prompt=prompt, truncate=False)
        return
    (ids,) = ours(file, 8192).encode_now([text], prompt=prompt, truncate=False)
    assert ids.tolist() == expected


def test_joining_differs_from_tokenising_apart(qwen_tokenizer: Path) -> None:
    """The prompt's last space belongs to the text's first word."""
    apart = whole(qwen_tokenizer, "Query: ") + whole(qwen_tokenizer, "hello")
    assert cut(qwen_tokenizer, "hello", 64, prompt="Query: ") != apart


@pytest.mark.parametrize("extra", [0, 1])
def test_the_limit_is_exact(file: Path, extra: int) -> None:
    """A text that fills the limit passes whole; with one token more it is refused by its index."""
    specials = len(whole(file, ""))
    text = " ".join(["word"] * (21 - specials + extra))
    assert len(whole(file, text)) == 21 + extra
    texts = ["short", text]
    if not extra:
        short, full = ours(file, 21).encode_now(texts, prompt="", truncate=False)
        assert full.tolist() == whole(file, text)
        assert short.tolist() == whole(file, "short")
        return
    with pytest.raises(InvalidRequestError, match=r"input\[1\].* 21 tokens") as refused:
        ours(file, 21).encode_now(texts, prompt="", truncate=False)
    assert (refused.value.code, refused.value.param) == ("input_too_long", "input[1]")


def test_special_tokens_stay_at_the_end_of_a_cut_text(file: Path) -> None:
    """The pooled token of a cut text is the one that the post-processor appends."""
    ids = cut(file, "all work and no play " * 1000, 21)
    appended = whole(file, "")
    assert len(ids) == 21
    assert ids[21 - len(appended) :] == appended


@pytest.mark.parametrize("truncate", [True, False])
def test_text_without_tokens_is_refused(qwen_tokenizer: Path, truncate: bool) -> None:
    """Where neither text nor post-processor gives a token, there is nothing to pool."""
    with pytest.raises(InvalidRequestError, match=r"input\[1\]") as refused:
        ours(qwen_tokenizer, 21).encode_now(["a", ""], prompt="", truncate=truncate)
    assert refused.value.code == "empty_input"
    assert refused.value.param == "input[1]"


@pytest.mark.parametrize("prompt", ["", "Document: "])
@pytest.mark.parametrize("length", [1, 5_000])
def test_text_that_adds_nothing_to_the_prompt_is_refused(
    file: Path, prompt: str, length: int
) -> None:
    """A text whose ids are those of the prompt alone would get the vector of every such text."""
    text = " " * length
    if whole(file, prompt + text) != whole(file, prompt):
        ours(file, 8192).encode_now(["a", text], prompt=prompt, truncate=False)
        return
    with pytest.raises(InvalidRequestError, match=r"input\[1\]") as refused:
        ours(file, 8192).encode_now(["a", text], prompt=prompt, truncate=False)
    assert (refused.value.code, refused.value.param) == ("empty_input", "input[1]")


@pytest.mark.anyio
async def test_concurrent_calls_get_their_own_ids(file: Path) -> None:
    """Many requests at once, in and out of the threads, each get the ids of their own texts."""
    rows = [[f"text {n} of {m}" * (1 + n % 97) for m in range(3)] for n in range(200)]
    tokenizer = ours(file, 64, threads=2)
    results = await asyncio.gather(
        *(tokenizer.encode(texts, prompt="Query: ", truncate=True) for texts in rows)
    )
    for texts, ids in zip(rows, results, strict=True):
        assert [list(i) for i in ids] == [whole(file, f"Query: {text}", 64) for text in texts]


def test_ids_beyond_the_vocabulary_are_refused(file: Path) -> None:
    """A tokenizer that can give ids the model has no row for belongs to another model."""
    highest = max(theirs(file).get_vocab().values())
    with pytest.raises(CheckpointError, match=f"up to {highest}.*only {highest}"):
        TextTokenizer(file, max_tokens=64, vocabulary=highest, threads=1)
    TextTokenizer(file, max_tokens=64, vocabulary=highest + 1, threads=1).close()


@pytest.mark.parametrize("damage", ["empty", "cut short", "no model", "no JSON"])
def test_a_damaged_file_is_refused(tmp_path: Path, file: Path, damage: str) -> None:
    """A tokenizer.json that cannot be read stops the start with the file's name."""
    content = file.read_bytes()
    broken = tmp_path / "tokenizer.json"
    broken.write_bytes(
        {
            "empty": b"",
            "cut short": content[: len(content) // 2],
            "no model": json.dumps({"version": "1.0", "added_tokens": []}).encode(),
            "no JSON": b"\xff" + content,
        }[damage]
    )
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        TextTokenizer(broken, max_tokens=64, vocabulary=VOCABULARY, threads=1)


def test_a_limit_below_the_special_tokens_is_refused(default_checkpoint: Checkpoint) -> None:
    """A limit that the special tokens alone fill stops the start."""
    with pytest.raises(CheckpointError, match="leaves no room"):
        TextTokenizer(default_checkpoint.tokenizer, max_tokens=1, vocabulary=VOCABULARY, threads=1)
