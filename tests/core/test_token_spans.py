"""All tokens of whole texts with their places: as the library tokenises the text in one call."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import examples
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.core import token_spans as spans_module
from taskvec.core.token_spans import SpanListing, TokenSpans, token_spans
from taskvec.errors import InvalidRequestError
from taskvec.priority import Priority
from tokenizing import ours, theirs

WORDS = "Grüße, \U0001f600 naïve 東京 e\u0301 can't 12,345.67\n\t \u2019 " * 9


def listed(file: Path, texts: list[str], prompt: str = "") -> list[TokenSpans]:
    """What the slices give, one after another."""
    work = SpanListing(ours(file, 64), texts, prompt)
    while not work.step()[1]:
        pass
    return work.found


def assert_whole(file: Path, found: TokenSpans, text: str) -> None:
    """Ids and places are those of one call of the library."""
    encoding = theirs(file).encode(text, add_special_tokens=False)
    assert found.text == text
    assert found.ids.tolist() == encoding.ids
    assert found.spans.tolist() == [list(span) for span in encoding.offsets]
    assert found.ids.dtype == found.spans.dtype == np.int32


@pytest.mark.parametrize("text", ["a", WORDS, " ", "\u200b\0", WORDS * 400, "x" * 5000 + " y"])
@pytest.mark.parametrize("prompt", ["", "Query: "])
def test_short_and_long_texts(file: Path, prompt: str, text: str) -> None:
    """Texts of one slice and of many have the tokens and the places of the whole, in characters."""
    others = ["b", text, WORDS]
    for found, other in zip(listed(file, others, prompt), others, strict=True):
        assert_whole(file, found, prompt + other)


@given(st.lists(st.text(max_size=400), min_size=1, max_size=5), st.integers(1, 400))
def test_any_texts(default_checkpoint: Checkpoint, texts: list[str], times: int) -> None:
    """Any texts, and long ones made of them, are listed as in one call.

    A long one is refused if it has no place where it can be cut.
    """
    for text in [*texts, " ".join(texts) * times]:
        found = None
        try:
            (found,) = listed(default_checkpoint.tokenizer, [text])
        except InvalidRequestError as error:
            refused = error.message
        if found is not None:
            assert_whole(default_checkpoint.tokenizer, found, text)
        else:
            assert len(text) >= 16_384
            assert "where it can be cut" in refused


def test_no_slice_is_long(file: Path) -> None:
    """Each call gets a bounded part of a text, and says how much it was."""
    text = WORDS * examples(500)
    work = SpanListing(ours(file, 64), [text, "a"], "")
    characters, done = 0, False
    while not done:
        step, done = work.step()
        assert step <= spans_module.MAX_SLICE
        characters += step
    assert characters == len(text) + 1


def test_a_text_without_a_place_to_cut_is_refused(file: Path) -> None:
    """A run of characters that cannot be cut is refused by name instead of blocking a thread."""
    with pytest.raises(
        InvalidRequestError, match=r"input\[1\] has no place from character 0"
    ) as no:
        listed(file, ["a", "x" * 400_000])
    assert (no.value.code, no.value.param) == ("input_too_long", "input[1]")
    with pytest.raises(InvalidRequestError, match="from character 0 to 16384"):
        listed(file, ["x" * 17_000 + " y"])
    (found,) = listed(file, ["x" * 16_000 + " y"])
    assert found.spans[-1].tolist()[1] == 16_002


def test_too_many_tokens_are_refused(
    default_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request lists a bounded number of tokens; it stops where it has more."""
    monkeypatch.setattr(spans_module, "MAX_TOKENS", 5000)
    work = SpanListing(ours(default_checkpoint.tokenizer, 64), ["a b c " * 100_000], "")

    def few_steps() -> None:
        for _ in range(5):  # of some thousand characters, and so many tokens
            work.step()

    with pytest.raises(InvalidRequestError, match="more than 5000 tokens") as refused:
        few_steps()
    assert refused.value.code == "too_many_tokens"


def test_too_many_tokens_are_not_listed(
    default_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokens of a call are counted before ids and places are made of them."""
    monkeypatch.setattr(spans_module, "MAX_TOKENS", 5)
    for listing in (SpanListing.step, SpanListing.list_inline):
        work = SpanListing(ours(default_checkpoint.tokenizer, 64), ["a b c d", "a b", "c"], "")
        with pytest.raises(InvalidRequestError, match="more than 5 tokens"):
            listing(work)
        assert len(work.found) <= 1


def test_cheap_texts_are_listed_without_other_threads(file: Path) -> None:
    """What is listed in the event loop has the same tokens, and each text is a call of its own."""
    texts = ["a", " ", "Grüße 東京"]
    tokenizer = ours(file, 64)
    assert tokenizer.is_cheap(texts)
    tokenizer.encode_with_offsets = None  # type: ignore[assignment, method-assign]
    found = asyncio.run(token_spans(tokenizer, texts, "Query: ", Priority.INTERACTIVE))
    for spans, text in zip(found, texts, strict=True):
        assert_whole(file, spans, f"Query: {text}")


@pytest.mark.anyio
async def test_large_work_waits_its_turn(default_checkpoint: Checkpoint) -> None:
    """A request that is not cheap runs in the tokenizer's threads; a cancelled one ends."""
    tokenizer = ours(default_checkpoint.tokenizer, 64)
    (found,) = await token_spans(tokenizer, [WORDS * 100], "", Priority.BULK)
    assert_whole(default_checkpoint.tokenizer, found, WORDS * 100)
    work = asyncio.create_task(token_spans(tokenizer, [WORDS * 3000], "", Priority.INTERACTIVE))
    await asyncio.sleep(0.05)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert tokenizer._queue._classes[Priority.INTERACTIVE].characters == 0
