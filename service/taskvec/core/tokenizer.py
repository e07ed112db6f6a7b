"""Tokenizer: text to token ids, reading no more of a text than will be kept.

A text that may be too long is tokenised in a window that grows until it holds enough *settled*
tokens: tokens that no later character can change. A token depends on nearby characters only: on the
run of similar characters that it is split from, and on the merges within that run. So a token is
settled once GUARD characters of the text follow it. There are two exceptions. A later line break
can join a whole run of white space to the line break before it: in white space that reaches the
window's end, nothing from the last line break on is settled. Normalisers reorder or drop whole runs
of combining marks and control characters: a run that reaches the window's end is not settled.

The window is limited, so that a hostile text costs no more than a long one: a text that does not
fill the limit within MAX_TOKEN_WIDTH characters per token, such as megabytes of white space, is
refused.
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
"""Characters after a token that settle it; far more than any token or normalised cluster has."""

CHARACTERS_PER_TOKEN = 5
"""First estimate for the window, which grows fourfold if tokens are longer."""

INLINE_CHARACTERS = 1024
"""Total length of texts that are tokenised in the event loop: it takes a fraction of a
millisecond, less than handing them to a thread."""

MAX_TOKEN_WIDTH = 256
"""Characters per token in the largest window; natural text has 2 to 8."""


class TokenizerObserver(Protocol):
    """Notified by a tokenizer; called from any thread."""

    def tokenizer_changed(self, busy: int, waiting: int) -> None:
        """The numbers of busy threads and of requests that wait for a thread have changed."""

    def text_cut(self, tokens: int) -> None:
        """A text that was too long lost this many tokens."""


class TextTokenizer:
    """A checkpoint's tokenizer with its post-processor, running in its own threads.

    Attributes:
        max_tokens: maximum tokens of a text, special tokens included.
    """

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
            max_tokens: maximum tokens of a text, special tokens included.
            vocabulary: number of token ids of the model; a tokenizer with higher ids is refused.
            threads: requests tokenised at the same time.
            observer: notified of thread usage and of truncated texts.

        Raises:
            CheckpointError: the file is damaged, or does not belong to the model.
        """
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # noqa: BLE001 - tokenizers raises plain Exception
            raise CheckpointError(
                f"{file} cannot be read ({error}): copy or download it again."
            ) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        highest = max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        if highest >= vocabulary:
            raise CheckpointError(
                f"{file} has ids up to {highest}, the model has only {vocabulary}: tokenizer and "
                "weights belong to different models."
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
        self._running = 0
        self._lock = threading.Lock()
        self._observer = observer

    async def encode(self, texts: Sequence[str], *, prompt: str, truncate: bool) -> list[TokenIds]:
        """Run ``encode_now``: in the event loop if the texts are short, else in a thread."""
        if sum(map(len, texts)) <= INLINE_CHARACTERS:
            return self.encode_now(texts, prompt=prompt, truncate=truncate)
        job = self._threads.submit(self.encode_now, texts, prompt=prompt, truncate=truncate)
        self._count(1)
        job.add_done_callback(self._job_ended)
        return await asyncio.wrap_future(job)

    def encode_now(self, texts: Sequence[str], *, prompt: str, truncate: bool) -> list[TokenIds]:
        """Return the model's input ids of each text.

        Args:
            texts: any strings.
            prompt: the task's prefix, put before each text.
            truncate: truncate texts that are too long, keeping the special tokens at their end; if
                False, refuse them.

        Returns:
            int32 arrays, each of 1 to ``max_tokens`` ids.

        Raises:
            InvalidRequestError: a text is too long, or has no tokens; names the text.
        """
        wanted = self._room if truncate else self._room + 1
        window = wanted * CHARACTERS_PER_TOKEN + GUARD
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

    def truncate(self, ids: list[int]) -> list[int]:
        """Return the first ``max_tokens`` of too many ids."""
        self._report_cut(len(ids) - self.max_tokens)
        return ids[: self.max_tokens]

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _job_ended(self, _: Future[list[TokenIds]]) -> None:
        self._count(-1)

    def _count(self, change: int) -> None:
        with self._lock:
            self._running += change
            if self._observer is not None:
                busy = min(self._running, self._size)
                self._observer.tokenizer_changed(busy, self._running - busy)

    def _report_cut(self, tokens: int) -> None:
        if self._observer is not None:
            self._observer.text_cut(tokens)

    def _specials(self) -> tuple[list[int], list[int]]:
        """Return the special tokens that the post-processor puts before and after a text."""
        bare = self._tokenizer.encode("a", add_special_tokens=False).ids
        framed = self._tokenizer.encode("a").ids
        for start in range(len(framed) - len(bare) + 1):
            if framed[start : start + len(bare)] == bare:
                return framed[:start], framed[start + len(bare) :]
        raise CheckpointError("tokenizer.json has a post-processor that rewrites the text's ids.")

    def _settled(
        self, prompt: str, text: str, index: int, wanted: int, window: int
    ) -> tuple[list[int], int]:
        """Return the first ``wanted`` ids of a long text, or all of them if it has fewer.

        Returns:
            The ids, and an estimate of how many follow them.
        """
        widest = wanted * MAX_TOKEN_WIDTH + GUARD
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
                    f"fewer than {wanted} tokens: it is mostly white space. Shorten it.",
                    code="input_too_long",
                    param=f"input[{index}]",
                )
            window = min(4 * window, widest)
        return self._encode_with_ends(prompt + text, index)[0], 0

    def _encode_with_ends(self, text: str, index: int) -> tuple[list[int], list[int]]:
        """Return the ids, and the character offset at which each one ends."""
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
                f"input[{index}] contains nothing that the tokenizer turns into a token.",
                code="empty_input",
                param=f"input[{index}]",
            )
        return np.array(ids, dtype=np.int32)


@contextmanager
def _untokenizable(param: str) -> Iterator[None]:
    """Convert a panic of the Rust library, which is a BaseException, to an InvalidRequestError.

    Seen with its regular expressions, which fail on runs of millions of white space characters.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise InvalidRequestError(
            f"{param} cannot be tokenised ({error}): it does not look like text.",
            code="untokenizable_input",
            param=param,
        ) from None


def _settled_until(window: str) -> int:
    """Return the offset up to which the tokens of a window inside a text are settled."""
    body = window.rstrip()
    trailing = window[len(body) :]
    last_break = max(trailing.rfind("\n"), trailing.rfind("\r"))
    end = len(body) + last_break + 1 if last_break >= 0 else len(window)
    while end and _joins(window[end - 1]):
        end -= 1
    return end - GUARD


def _joins(character: str) -> bool:
    """Return whether normalisers drop or reorder it: marks, and controls except white space."""
    return unicodedata.category(character)[0] in "MC" and not character.isspace()
