"""Cut points: the tokens of the parts of a text are those of the whole, or it is not cut."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.normalizers import NFKC, Lowercase, Sequence
from tokenizers.pre_tokenizers import ByteLevel, Metaspace, Split

from conftest import examples
from taskvec.core.cut_points import LLAMA3_PATTERN, CutPoints

GPT2, LLAMA3 = "GPT-2's regular expression", "Llama 3's regular expression"

JOINED = [
    *("x", "9", ".", "\u0301", "\u0338", "\u200d", "\0", "'", "'s", " '", "=", "\u1100\u1161"),
    *(" ", "  ", "\n", "\r\n", " \n", "\t", "\u00a0", "\u180e", "\x1c", "\x85", "\u2028", "\ufffd"),
    *("。", "，", "、漢", "漢。字", "かな。", "カナ、", "한국.", "一", "σς", "Σ.", "İ", "ﬁ", "…"),  # noqa: RUF001
    *("<|endoftext|>", "<|im_", "start|>", "</think>", "[SEP]", "[SE", "P]", "[MASK]", "##ing"),
    *(
        "the quick brown fox",
        " don't",
        "'LL",
        "def f(x):\n    return x",
        "2024-05-06",
        "नमस्ते",
        "مرحبا",
    ),
    *("q" * 99 + "\u16a0", "a" * 120, "https://a.b/c?d=e+f", "3.14,15", "x=\u0338y", "😀", "👩‍👧"),
]
"""What is next to a cut, or might be thought to be: joined to its neighbours in random order."""

TEXTS = st.lists(
    st.one_of(st.sampled_from(JOINED), st.text(max_size=6)),
    min_size=2,
    max_size=30,
).map("".join)


@cache
def tokenizer_of(file: Path, variant: str = "") -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(file))
    if variant == GPT2:
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    if variant == LLAMA3:
        state = json.loads(tokenizer.to_str())
        state["normalizer"] = None
        state["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": LLAMA3_PATTERN}
        return Tokenizer.from_str(json.dumps(state))
    return tokenizer


@cache
def cuts_of(file: Path, variant: str = "") -> CutPoints:
    return CutPoints(tokenizer_of(file, variant))


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    given_ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return given_ids


def all_cuts(cuts: CutPoints, text: str) -> list[int]:
    """Every cut point below the end of a text, from the last to the first."""
    found = []
    stop = len(text) - 1
    while (cut := cuts.last(text, 0, stop)) is not None:
        found.append(cut)
        stop = cut - 1
    return found


def check(tokenizer: Tokenizer, cuts: CutPoints, text: str) -> None:
    """Check every single cut, all cuts together, and that both directions find the same ones."""
    whole = ids(tokenizer, text)
    points = all_cuts(cuts, text)
    for cut in points:
        assert ids(tokenizer, text[:cut]) + ids(tokenizer, text[cut:]) == whole, cut
    parts = [0, *reversed(points), len(text)]
    assert [i for a, b in pairwise(parts) for i in ids(tokenizer, text[a:b])] == whole
    start = 0
    for cut in reversed(points):
        assert cuts.first(text, start, len(text) - 1) == cut
        start = cut
    assert cuts.first(text, start, len(text) - 1) is None


@settings(max_examples=examples(500))
@given(text=TEXTS)
def test_the_parts_have_the_tokens_of_the_whole(file: Path, text: str) -> None:
    """Cut at any cut point, a text has the tokens that it has in one piece."""
    check(tokenizer_of(file), cuts_of(file), text)


@pytest.mark.parametrize("variant", [GPT2, LLAMA3])
@settings(max_examples=examples(500))
@given(text=TEXTS)
def test_other_byte_level_tokenizers_are_cut(qwen_tokenizer: Path, variant: str, text: str) -> None:
    """The rule holds for the regular expressions of GPT-2 and Llama 3 as well."""
    check(tokenizer_of(qwen_tokenizer, variant), cuts_of(qwen_tokenizer, variant), text)


@pytest.mark.parametrize("variant", ["", GPT2, LLAMA3])
def test_every_pair_of_neighbours_is_cut_right(qwen_tokenizer: Path, variant: str) -> None:
    """Between any two of the neighbours above, a cut changes nothing."""
    tokenizer, cuts = tokenizer_of(qwen_tokenizer, variant), cuts_of(qwen_tokenizer, variant)
    order = random.Random(3)
    pairs = [(a, b) for a in JOINED for b in JOINED]
    for a, b in order.sample(pairs, 1000):
        check(tokenizer, cuts, f"{a}{b}{order.choice(JOINED)} {b}{a}")


def test_ordinary_text_has_many_cut_points(file: Path) -> None:
    """Words, lines, and sentences of scripts without spaces can be cut."""
    cuts = cuts_of(file)
    for text in ("all work and no play ", "x = f(1)\n    y = 2\n", "漢字仮名交じり文。日本語、"):
        many = text * 100
        assert len(all_cuts(cuts, many)) >= 100, text


def test_a_cut_lies_within_what_was_asked(file: Path) -> None:
    """The last cut point up to a position, the first one behind another; None if there is none."""
    cuts = cuts_of(file)
    text = "aaa bbb ccc ddd"
    assert cuts.last(text, 0, 14) == 11
    assert cuts.last(text, 0, 11) == 11
    assert cuts.last(text, 0, 10) == 7
    assert cuts.last(text, 7, 10) is None
    assert cuts.first(text, 0, 14) == 3
    assert cuts.first(text, 3, 14) == 7
    assert cuts.first(text, 11, 14) is None


def _added(token: AddedToken) -> Callable[[Tokenizer], None]:
    return lambda tokenizer: tokenizer.add_tokens([token]) and None


def _set(part: str, value: object) -> Callable[[Tokenizer], None]:
    return lambda tokenizer: setattr(tokenizer, part, value)


@pytest.mark.parametrize(
    "change",
    {
        "another regular expression": _set(
            "pre_tokenizer", Split(re.escape("the quick"), "isolated")
        ),
        "words with a mark": _set("pre_tokenizer", Metaspace()),
        "a space before the text": _set("pre_tokenizer", ByteLevel(add_prefix_space=True)),
        "no pre-tokenizer": _set("pre_tokenizer", None),
        "another normaliser": _set("normalizer", NFKC()),
        "several normalisers": _set("normalizer", Sequence([NFKC(), Lowercase()])),
        "a token with a space": _added(AddedToken("of the")),
        "a token that takes the space behind it": _added(AddedToken("<a>", rstrip=True)),
        "a token that takes the space before it": _added(AddedToken("<a>", lstrip=True)),
        "a token that is a word": _added(AddedToken("abc", single_word=True)),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_tokenizer_that_is_not_known_is_not_cut(
    qwen_tokenizer: Path, change: tuple[str, Callable[[Tokenizer], None]]
) -> None:
    """Where the rule may not hold, there are no cut points."""
    tokenizer = Tokenizer.from_file(str(qwen_tokenizer))
    change[1](tokenizer)
    assert all_cuts(CutPoints(tokenizer), "all work. and no play\n" * 10) == []
