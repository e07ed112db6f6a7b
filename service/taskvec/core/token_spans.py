"""Tokens of whole texts with their places, in slices, for clients that count or split texts.

Unlike ``core.tokenizer``, which reads no more of a text than will be embedded, this lists every
token. A text is cut where the tokens of the parts are those of the whole (``CutPoints``); a run of
``MAX_SLICE`` characters without such a place is refused: the library lists the places of all tokens
of a call at once, for which it holds the interpreter lock.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding

from taskvec.core.tokenizer import (
    MAX_SLICE,
    MIN_SLICE,
    SLICE_TEXTS,
    TextTokenizer,
    next_slice,
)
from taskvec.errors import InvalidRequestError
from taskvec.priority import Priority

MAX_TOKENS = 1 << 18
"""Maximum number of tokens that one request lists: some 20 MB of JSON."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenSpans:
    """Tokens of one text, without special tokens.

    Attributes:
        text: what was tokenised: the prompt and the text.
        ids: int32 [tokens].
        spans: int32 [tokens, 2]: the characters of ``text`` that a token stands for; tokens that
            are parts of one character all have it.
    """

    text: str
    ids: NDArray[np.int32]
    spans: NDArray[np.int32]


async def token_spans(
    tokenizer: TextTokenizer, texts: Sequence[str], prompt: str, priority: Priority
) -> list[TokenSpans]:
    """Tokenise texts: in the event loop if that is cheap, else in turns in a thread.

    Args:
        tokenizer: of the model.
        texts: any strings.
        prompt: put before each text; may be empty.
        priority: class of the request.

    Raises:
        InvalidRequestError: too many tokens, or a text that cannot be cut.
        QueueFullError: too many characters wait for the tokenizer.
    """
    work = SpanListing(tokenizer, texts, prompt)
    if tokenizer.is_cheap(texts):
        work.list_inline()
    else:
        await tokenizer.run(work, sum(map(len, texts)), priority)
    return work.found


class SpanListing:
    """Lists the tokens of the texts of one request in slices; see ``SlicedWork``.

    Attributes:
        found: tokens of the texts that are complete.
    """

    def __init__(self, tokenizer: TextTokenizer, texts: Sequence[str], prompt: str) -> None:
        """Prepare; ``step`` does the work."""
        self.found: list[TokenSpans] = []
        self._tokenizer = tokenizer
        self._texts = texts
        self._prompt = prompt
        self._slice = MIN_SLICE
        self._tokens = 0
        self._text = ""  # the long text that is being tokenised, with its prompt
        self._start = 0
        self._window = 0
        self._parts: list[tuple[NDArray[np.int32], NDArray[np.int32]]] = []

    def list_inline(self) -> None:
        """List the tokens of texts that are cheap; see ``TextTokenizer.encode_inline``.

        Raises:
            InvalidRequestError: see ``token_spans``.
        """
        for index, text in enumerate(self._texts):
            whole = self._prompt + text
            encoding = self._tokenizer.encode_alone(whole, _name(index))
            self.found.append(TokenSpans(whole, *self._listed(encoding)))

    def step(self) -> tuple[int, bool]:
        """Tokenise one slice; return its characters, and whether all texts are done.

        Raises:
            InvalidRequestError: see ``token_spans``.
        """
        began = time.perf_counter()
        text = self._texts[len(self.found)]
        if self._text or len(text) > self._slice:
            characters = self._step_in(text)
        else:
            characters = self._step_over()
        self._slice = next_slice(characters, time.perf_counter() - began)
        return characters, len(self.found) == len(self._texts)

    def _step_over(self) -> int:
        """Tokenise the next short texts; return their characters."""
        start = len(self.found)
        characters = 0
        batch: list[str] = []
        for text in self._texts[start : start + SLICE_TEXTS]:
            if batch and characters + len(text) > self._slice:
                break
            characters += len(text)
            batch.append(self._prompt + text)
        for text, (ids, spans) in zip(batch, self._encoded(batch, start), strict=True):
            self.found.append(TokenSpans(text, ids, spans))
        return characters

    def _step_in(self, text: str) -> int:
        """Tokenise the next part of a long text; return its characters."""
        if not self._text:
            self._text = self._prompt + text
        whole, start = self._text, self._start
        stop = min(start + max(self._window, self._slice), len(whole))
        cut = self._cut(start, stop)
        if cut is None:
            if stop - start >= MAX_SLICE:
                where = _name(len(self.found))
                raise InvalidRequestError(
                    f"{where} has no place from character {start} to {stop} where it can be cut: "
                    "send its parts as texts of their own.",
                    code="input_too_long",
                    param=where,
                )
            self._window = min(2 * (stop - start), MAX_SLICE)
            return 0
        ((ids, spans),) = self._encoded([whole[start:cut]], len(self.found))
        self._parts.append((ids, spans + np.int32(start)))
        self._start, self._window = cut, 0
        if cut == len(whole):
            ids, spans = (np.concatenate(parts) for parts in zip(*self._parts, strict=True))
            self.found.append(TokenSpans(whole, ids, spans))
            self._text, self._start, self._parts = "", 0, []
        return cut - start

    def _cut(self, start: int, stop: int) -> int | None:
        """Return where the next part ends; None without a cut point up to ``stop``."""
        if stop == len(self._text):
            return stop
        return self._tokenizer.cut_points.last(self._text, start, stop)

    def _encoded(
        self, texts: Sequence[str], first: int
    ) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
        where = _name(first)
        if len(texts) > 1:
            where = f"{where} to {_name(first + len(texts) - 1)}"
        return list(map(self._listed, self._tokenizer.encode_with_offsets(texts, where)))

    def _listed(self, encoding: Encoding) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return ids and places, unless they are too many with those before them."""
        count = len(encoding)
        self._tokens += count
        if self._tokens > MAX_TOKENS:
            raise InvalidRequestError(
                f"The texts have more than {MAX_TOKENS} tokens: send fewer at once, or shorter "
                "ones.",
                code="too_many_tokens",
            )
        # Half of the time of np.array, which holds the interpreter lock as well.
        places = itertools.chain.from_iterable(encoding.offsets)
        spans = np.fromiter(places, dtype=np.int32, count=2 * count).reshape(-1, 2)
        return np.array(encoding.ids, dtype=np.int32), spans


def _name(index: int) -> str:
    return f"input[{index}]"
