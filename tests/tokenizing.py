"""Tokenizers that several tests share: Qwen3's takes a second and 100 MB to load."""

from __future__ import annotations

from copy import copy
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer

from qwen import VOCABULARY
from taskvec.core.tokenizer import TextTokenizer


def ours(file: Path, max_tokens: int, threads: int = 1) -> TextTokenizer:
    """Return our tokenizer with a limit; it is loaded once for all limits."""
    tokenizer = copy(_ours(file, threads))
    tokenizer.room += max_tokens - tokenizer.max_tokens
    tokenizer.max_tokens = max_tokens
    return tokenizer


def theirs(file: Path, max_tokens: int | None = None) -> Tokenizer:
    """Return the library's tokenizer; its limit holds until the next call."""
    tokenizer = _theirs(file)
    tokenizer.no_truncation()
    if max_tokens is not None:
        tokenizer.enable_truncation(max_tokens)
    return tokenizer


def forget_tokenizers() -> None:
    """Free all tokenizers that nobody else has."""
    _ours.cache_clear()
    _theirs.cache_clear()


@cache
def _ours(file: Path, threads: int) -> TextTokenizer:
    return TextTokenizer(file, max_tokens=2048, vocabulary=VOCABULARY, threads=threads)


@cache
def _theirs(file: Path) -> Tokenizer:
    return Tokenizer.from_file(str(file))
