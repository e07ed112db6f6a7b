"""Text to token ids, without reading what will be cut off.

A text that may be too long is tokenised in a window that grows until it holds enough *settled*
tokens: those that no later character can change. What decides a token lies near it: the run of
like characters it is split from, and the merges within that run. So a token is settled once GUARD
characters of the text lie behind it. White space is the exception: a later line break can join a
whole run of it to the line break before, so in a run that reaches the window's end nothing from
its last line break on is settled. Combining marks and control characters are another: normalisers
reorder or drop whole runs of them, so a run that reaches the window's end does not count either.

The window is bounded too, so that a hostile text costs no more than a long one: where WIDEST_TOKEN
characters a token do not fill the limit (megabytes of white space, say), the text is refused.
"""

from __future__ import annotations

import asyncio
import bisect
import threading
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
from tokenizers import Encoding, Tokenizer

from taskvec.engines.base import TokenIds
from taskvec.errors import CheckpointError, InvalidRequestError

GUARD = 2048
"""Characters behind a token that settle it; far longer than any token or normalised cluster."""

CHARACTERS_A_TOKEN = 5
"""First guess for the window; a text of longer tokens lets it grow fourfold."""

INLINE_CHARACTERS = 1024
"""Texts this short are tokenised on the spot: a fraction of a millisecond, less than a thread's
hand-over takes."""

WIDEST_TOKEN = 256
"""Characters a token in the widest window; natural text has 2 to 8."""


class TokenizerObserver(Protocol):
    """What a tokenizer reports while it works; called from any thread."""

    def tokenizer_changed(self, busy: int, waiting: int) -> None:
        """So many of its threads are busy, so many requests wait for one."""

    def text_cut(self, tokens: int) -> None:
        """A text was too long and lost so many tokens."""


class TextTokenizer:
    """A checkpoint's tokenizer, its own post-processor included, in threads of its own."""

    def __init__(
        self,
        file: Path,
        *,
        max_tokens: int,
        vocabulary: int,
        threads: int,
        observer: TokenizerObserver | None = None,
    ) -> None:
        """Load tokenizer.json.

        Args:
            file: tokenizer.json.
            max_tokens: longest text, special tokens included.
            vocabulary: the model's; a tokenizer that can give other ids is refused.
            threads: how many requests are tokenised at once.
            observer: told of its threads and of texts that are cut.

        Raises:
            CheckpointError: the file is damaged or does not belong to the model.
        """
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # noqa: BLE001 - tokenizers raises just that
            raise CheckpointError(
                f"{file} cannot be read ({error}): copy or download it again."
            ) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        highest = max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        if highest >= vocabulary:
            raise CheckpointError(
                f"{file} gives ids up to {highest}, the model has only {vocabulary}: tokenizer and "
                "weights are not of one model."
            )
        self._head, self._tail = self._specials()
        self.max_tokens = max_tokens
        self._room = max_tokens - len(self._head) - len(self._tail)
        if self._room < 1:
            raise CheckpointError(
                f"max_tokens {max_tokens} leaves no room beside the tokenizer's special tokens."
            )
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="tokenizer")
        self._size = threads
        self._jobs = 0
        self._counting = threading.Lock()
        self._observer = observer

    async def encode(self, texts: Sequence[str], *, prompt: str, truncate: bool) -> list[TokenIds]:
        """``encode_now``: small requests at once, others in one of the tokenizer's threads."""
        if sum(map(len, texts)) <= INLINE_CHARACTERS:
            return self.encode_now(texts, prompt=prompt, truncate=truncate)
        job = self._threads.submit(self.encode_now, texts, prompt=prompt, truncate=truncate)
        self._count(1)
        job.add_done_callback(self._job_ended)
        return await asyncio.wrap_future(job)

    def encode_now(self, texts: Sequence[str], *, prompt: str, truncate: bool) -> list[TokenIds]:
        """The ids that the model is to see for each text.

        Args:
            texts: any strings; the prompt is joined to each before tokenising.
            prompt: the task's prefix.
            truncate: True cuts a text that is too long, keeping the special tokens at its end.

        Returns:
            int32 arrays, each 1..max_tokens long.

        Raises:
            InvalidRequestError: naming the text that is too long, or gives no token at all.
        """
        wanted = self._room if truncate else self._room + 1
        window = wanted * CHARACTERS_A_TOKEN + GUARD
        short = [i for i, text in enumerate(texts) if len(prompt) + len(text) <= window]
        with _untokenizable("input"):
            encodings: list[Encoding] = self._tokenizer.encode_batch_fast(
                [prompt + texts[i] for i in short], add_special_tokens=False
            )
        contents = {i: (encoding.ids, 0) for i, encoding in zip(short, encodings, strict=True)}
        for i, text in enumerate(texts):
            if i not in contents:
                contents[i] = self._settled(prompt, text, i, wanted, window)
        return [self._framed(*contents[i], i, truncate=truncate) for i in range(len(texts))]

    def cut(self, ids: list[int]) -> list[int]:
        """The first ids of too many, as they are."""
        self._report_cut(len(ids) - self.max_tokens)
        return ids[: self.max_tokens]

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _job_ended(self, _: Future[list[TokenIds]]) -> None:
        self._count(-1)

    def _count(self, jobs: int) -> None:
        with self._counting:
            self._jobs += jobs
            if self._observer is not None:
                busy = min(self._jobs, self._size)
                self._observer.tokenizer_changed(busy, self._jobs - busy)

    def _report_cut(self, tokens: int) -> None:
        if self._observer is not None:
            self._observer.text_cut(tokens)

    def _specials(self) -> tuple[list[int], list[int]]:
        """The ids that the post-processor puts before and after a text."""
        bare = self._tokenizer.encode("a", add_special_tokens=False).ids
        framed = self._tokenizer.encode("a").ids
        for start in range(len(framed) - len(bare) + 1):
            if framed[start : start + len(bare)] == bare:
                return framed[:start], framed[start + len(bare) :]
        raise CheckpointError("tokenizer.json has a post-processor that rewrites the text's ids.")

    def _settled(
        self, prompt: str, text: str, index: int, wanted: int, window: int
    ) -> tuple[list[int], int]:
        """The first ``wanted`` ids of a long text, or all of them where it has fewer.

        And how many there are beyond, estimated from those that were read.
        """
        widest = wanted * WIDEST_TOKEN + GUARD
        length = len(prompt) + len(text)
        while window < length:
            seen = prompt + text[: window - len(prompt)]
            ids, ends = self._encode_with_ends(seen, index)
            settled = bisect.bisect_right(ends, _settled_until(seen))
            if settled >= wanted:
                read = ends[wanted - 1]
                return ids[:wanted], max(1, round(wanted * (length - read) / read))
            if window == widest:
                raise InvalidRequestError(
                    f"input[{index}] has {len(text)} characters, of which the first {window} hold "
                    f"fewer than {wanted} tokens: it is mostly white space or no text. Shorten it.",
                    code="input_too_long",
                    param=f"input[{index}]",
                )
            window = min(4 * window, widest)
        return self._encode_with_ends(prompt + text, index)[0], 0

    def _encode_with_ends(self, text: str, index: int) -> tuple[list[int], list[int]]:
        """Ids, and the character each one ends at."""
        with _untokenizable(f"input[{index}]"):
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, [end for _, end in encoding.offsets]

    def _framed(self, content: list[int], beyond: int, index: int, *, truncate: bool) -> TokenIds:
        lost = len(content) + beyond - self._room
        if lost > 0:
            if not truncate:
                raise InvalidRequestError(
                    f"input[{index}] has more than the {self.max_tokens} tokens that fit (prompt "
                    "and special tokens included): shorten it, or send truncate: true.",
                    code="input_too_long",
                    param=f"input[{index}]",
                )
            self._report_cut(lost)
            content = content[: self._room]
        ids = self._head + content + self._tail
        if not ids:
            raise InvalidRequestError(
                f"input[{index}] holds nothing that the tokenizer turns into a token.",
                code="empty_input",
                param=f"input[{index}]",
            )
        return np.array(ids, dtype=np.int32)


@contextmanager
def _untokenizable(param: str) -> Iterator[None]:
    """Turn a panic of the Rust library, which is no Exception, into a refusal.

    Seen with its regular expressions, which give up on white space runs of millions of characters.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise InvalidRequestError(
            f"{param} cannot be tokenised ({error}): it is hardly text.",
            code="untokenizable_input",
            param=param,
        ) from None


def _settled_until(window: str) -> int:
    """How far tokens of a window that is not the text's end are settled, in characters."""
    body = window.rstrip()
    trailing = window[len(body) :]
    last_break = max(trailing.rfind("\n"), trailing.rfind("\r"))
    end = len(body) + last_break + 1 if last_break >= 0 else len(window)
    while end and _joins(window[end - 1]):
        end -= 1
    return end - GUARD


def _joins(character: str) -> bool:
    """True for what normalisers drop or reorder: combining marks, and controls but for breaks."""
    return unicodedata.category(character)[0] in "MC" and not character.isspace()
