"""Positions at which a text can be cut without changing its tokens.

A text is cut where its pre-tokenizer starts a new pre-token whatever stands around it, and where
normalisation joins nothing: the tokens of the two parts are then those of the whole. Only the
pre-tokenizers below are known well enough; a text of another tokenizer is not cut.

* BERT's drops white space, and makes a pre-token of every punctuation mark and every ideograph.
* The byte-level ones of GPT-2, Qwen and Llama 3 keep letters, numbers and other characters apart,
  and start a pre-token at the first character of white space.

A space, a line break and the punctuation below neither combine with the character before them nor
move in any Unicode normal form. The property tests compare the parts with the whole.
"""

from __future__ import annotations

import json
import re
from typing import Any

from tokenizers import Tokenizer

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_PATTERN = QWEN_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")

BREAKS = "\n\t"
PUNCTUATION = ",.;:!?/+-=。、，．；：！？"  # noqa: RUF001 - the full-width ones are meant

# Letters and digits that every version of Unicode classifies alike: the tokenizer's regular
# expressions and Python's may be of different versions.
_ALPHANUMERIC = "A-Za-z0-9ぁ-ゖァ-ヺ一-鿿가-힣"


class CutPoints:
    """Finds the cut points of the texts of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Choose the rule for a tokenizer."""
        rule = _rule(tokenizer)
        self._last = re.compile(f"(?s:.*)(?:{rule})") if rule else None
        self._first = re.compile(rule) if rule else None

    def last(self, text: str, start: int, stop: int) -> int | None:
        """Return the last cut point above ``start`` and up to ``stop``; None if there is none.

        Args:
            text: the text; cut at ``start``, or starting there.
            start: 0, or a cut point.
            stop: less than the text's length.
        """
        found = self._last and self._last.match(text, start, stop + 1)
        return found.end() if found else None

    def first(self, text: str, start: int, stop: int) -> int | None:
        """Return the first cut point above ``start`` and up to ``stop``; None if there is none."""
        found = self._first and self._first.search(text, start, stop + 1)
        return found.end() if found else None


def _rule(tokenizer: Tokenizer) -> str | None:
    """Return a regular expression that ends at a cut point; None if there are none."""
    added = tokenizer.get_added_tokens_decoder().values()
    for token in added:
        if token.lstrip or token.rstrip or token.single_word or re.search(r"\s", token.content):
            return None
    if getattr(tokenizer.model, "dropout", None):
        return None
    inside = {character for token in added for character in token.content[1:]}
    punctuation = "".join(map(re.escape, (c for c in PUNCTUATION if c not in inside)))
    normalizer, splitter = _state(tokenizer.normalizer), _state(tokenizer.pre_tokenizer)
    if normalizer is None or splitter is None:
        return None
    if splitter == {"type": "BertPreTokenizer"} and normalizer.get("type") in (
        None,
        "BertNormalizer",
    ):
        apart = normalizer.get("handle_chinese_chars") and not any(
            "一" <= c <= "鿿" for c in inside
        )
        ideographs = "一-鿿" if apart else ""
        return f"(?s:.)(?=[ {BREAKS}{punctuation}{ideographs}])"
    if _is_byte_level(splitter) and normalizer.get("type") in (None, "NFC"):
        return rf"\S(?= )|[{_ALPHANUMERIC}](?=[{BREAKS}{punctuation}])"
    return None


def _is_byte_level(splitter: dict[str, Any]) -> bool:
    """Return whether a pre-tokenizer is GPT-2's, Qwen's or Llama 3's."""
    if splitter.get("type") == "ByteLevel":
        return splitter.get("use_regex") is True and splitter.get("add_prefix_space") is False
    match splitter:
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", **split},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            known = pattern in (QWEN_PATTERN, LLAMA3_PATTERN)
            return known and not split.get("invert")
    return False


def _state(part: Any) -> dict[str, Any] | None:
    """Return a part of a tokenizer as in tokenizer.json: {} without it, None if not known."""
    if part is None:
        return {}
    try:
        state = json.loads(part.__getstate__())
    except (TypeError, ValueError):
        return None
    return state if isinstance(state, dict) else None
