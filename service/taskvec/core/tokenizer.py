"""Tokenizer: text to token ids, in slices, reading no more of a text than will be kept.

A request is tokenised in slices (``Tokenization``): each is one call of the tokenizers library with
some thousand characters. So no call takes long or holds the interpreter lock for long, the requests
of other clients get their turns in between (``TokenizerQueue``), a request whose client has gone
stops, and so does one with a text that is too long, before its other texts are tokenised.

A long text is cut where the tokens of the parts are those of the whole (``CutPoints``). Where it
has no such place, it is tokenised in a window that grows until it has one, or until it holds enough
*settled* tokens: tokens that no later character can change. A token depends on nearby characters
only: on the run of similar characters that it is split from, and on the merges within that run. So
a token is settled once GUARD characters of the text follow it. There are two exceptions. A later
line break can join a whole run of white space to the line break before it: in white space that
reaches the window's end, nothing from the last line break on is settled. Normalisers reorder or
drop whole runs of combining marks and control characters: a run that reaches the window's end is
not settled.

What is read is limited, so that a hostile text costs no more than a long one: a text that does not
fill the limit within MAX_TOKEN_WIDTH characters per token, such as megabytes of white space, is
refused, and so is one without a cut point and without enough tokens in MAX_WINDOW characters.
"""

from __future__ import annotations

import bisect
import re
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
from tokenizers import Encoding, Tokenizer

from taskvec.core.cut_points import CutPoints
from taskvec.core.tokenizer_queue import SlicedWork, TokenizerQueue
from taskvec.engines.base import TokenIds
from taskvec.errors import CheckpointError, InvalidRequestError
from taskvec.priority import Priority

GUARD = 2048
"""Characters after a token that settle it; far more than any token or normalised cluster has."""

MAX_TOKEN_WIDTH = 256
"""Characters per token of what is read of a text; natural text has 2 to 8."""

MAX_WINDOW = 1 << 17
"""Characters of the largest call: copying them into the library and freeing its result take some
milliseconds, in which it holds the interpreter lock."""

MIN_SLICE, MAX_SLICE = 2048, 16_384
"""Characters of a slice. English takes 4 ms per 16,384 characters, words of 100 letters that are
not in the vocabulary 7 ms per 2,048."""

SLICE_SECONDS = 0.004
"""Time that a slice should take: the next one of a request has as many characters as the last one
would have needed for it."""

SLICE_TEXTS = 256
"""Maximum number of texts in a slice."""

INLINE_COST = 768
"""Total cost of texts that are tokenised in the event loop: at most a millisecond, on average a
fraction of one, which is less than handing them to a thread. A character costs 1, or 2 in a text
that is not ASCII, and a text TEXT_COST."""

TEXT_COST = 16

HARD_WORD = re.compile(r"[^\s!-/:-@\[-`{-~一-鿿]{25}")
"""A word that WordPiece may look up piece by piece: its cost grows with the square of its
length."""

MAX_WAITING_CHARACTERS = 1 << 25
"""Characters of a priority class that wait for the tokenizer or are being tokenised: 10 seconds of
English in one thread."""


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
        room: maximum tokens of a text, special tokens not included.
        cut_points: where texts may be cut.
    """

    def __init__(
        self,
        file: Path,
        *,
        max_tokens: int,
        vocabulary: int,
        threads: int,
        max_waiting: int = MAX_WAITING_CHARACTERS,
        observer: TokenizerObserver | None = None,
    ) -> None:
        """Load tokenizer.json.

        Args:
            file: tokenizer.json.
            max_tokens: maximum tokens of a text, special tokens included.
            vocabulary: number of token ids of the model; a tokenizer with higher ids is refused.
            threads: requests tokenised at the same time.
            max_waiting: characters of a priority class that may wait, see ``TokenizerQueue``.
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
        self.room = max_tokens - len(self._head) - len(self._tail)
        if self.room < 1:
            raise CheckpointError(
                f"max_tokens {max_tokens} leaves no room beside the tokenizer's special tokens."
            )
        self.cut_points = CutPoints(self._tokenizer)
        self._hard_words = type(self._tokenizer.model).__name__ != "BPE"
        self._observer = observer
        self._prompt_ids: dict[str, list[int]] = {}
        self._queue = TokenizerQueue(threads, max_waiting, self._report_queue)

    async def encode(
        self,
        texts: Sequence[str],
        *,
        prompt: str,
        truncate: bool,
        priority: Priority = Priority.INTERACTIVE,
    ) -> list[TokenIds]:
        """Run ``encode_now``: in the event loop if that is cheap, else in turns in a thread.

        Raises:
            QueueFullError: too many characters wait for the tokenizer.
        """
        if self.is_cheap(texts):
            return self.encode_inline(texts, prompt, truncate=truncate)
        work = Tokenization(self, texts, prompt, truncate=truncate)
        await self._queue.run(work, work.characters, priority)
        return work.ids

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
        work = Tokenization(self, texts, prompt, truncate=truncate)
        while not work.done:
            work.step()
        return work.ids

    def encode_batch(self, texts: Sequence[str], where: str) -> list[Encoding]:
        """Return the encodings of texts, of some thousand characters together.

        ``encode_batch_fast`` releases the interpreter lock; ``encode`` does not.

        Args:
            texts: with their prompts.
            where: the texts' place in the request, for error messages.
        """
        with _untokenizable(where):
            encodings: list[Encoding] = self._tokenizer.encode_batch_fast(
                texts, add_special_tokens=False
            )
        return encodings

    def encode_with_offsets(self, texts: Sequence[str], where: str) -> list[Encoding]:
        """Do what ``encode_batch`` does; the encodings have the characters of each token."""
        with _untokenizable(where):
            encodings: list[Encoding] = self._tokenizer.encode_batch(
                texts, add_special_tokens=False
            )
        return encodings

    def encode_alone(self, text: str, where: str) -> Encoding:
        """Return the encoding of a text that is cheap, with the characters of each token.

        ``Tokenizer.encode`` keeps the interpreter lock: giving it up for so short a time, and
        waiting until other threads return it, would take longer.

        Args:
            text: with its prompt.
            where: see ``encode_batch``.
        """
        with _untokenizable(where):
            encoding: Encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding

    async def run(self, work: SlicedWork, characters: int, priority: Priority) -> None:
        """Do other work with this tokenizer in its turns; see ``TokenizerQueue.run``."""
        await self._queue.run(work, characters, priority)

    def special_tokens(self) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
        """Return the special tokens before and after a text: the id of each, and its name."""
        head, tail = (
            [(token, self._tokenizer.id_to_token(token) or "") for token in ids]
            for ids in (self._head, self._tail)
        )
        return head, tail

    def first_ids(self, text: str, until: int, count: int, where: str) -> tuple[list[int], int]:
        """Return the first ids of a text.

        Args:
            text: with its prompt.
            until: character at which the last one must end.
            count: maximum number of ids.
            where: see ``encode_batch``.

        Returns:
            The ids, and the character at which the last one ends.
        """
        with _untokenizable(where):
            (encoding,) = self._tokenizer.encode_batch([text], add_special_tokens=False)

        def end_of(token: int) -> int:  # a list of all offsets would hold the interpreter lock
            characters = encoding.token_to_chars(token)
            return characters[1] if characters else 0

        found = min(count, bisect.bisect_right(range(len(encoding)), until, key=end_of))
        return encoding.ids[:found], end_of(found - 1) if found else 0

    def truncate(self, ids: list[int]) -> list[int]:
        """Return the first ``max_tokens`` of too many ids."""
        self._report_cut(len(ids) - self.max_tokens)
        return ids[: self.max_tokens]

    def close(self) -> None:
        """End the threads."""
        self._queue.close()

    def _report_queue(self, busy: int, waiting: int) -> None:
        if self._observer is not None:
            self._observer.tokenizer_changed(busy, waiting)

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

    def is_cheap(self, texts: Sequence[str]) -> bool:
        """Return whether texts may be tokenised in the event loop."""
        if len(texts) * TEXT_COST + sum(map(len, texts)) > INLINE_COST:
            return False
        cost = sum(TEXT_COST + len(text) * (1 if text.isascii() else 2) for text in texts)
        if cost > INLINE_COST:
            return False
        return not (self._hard_words and any(map(HARD_WORD.search, texts)))

    def encode_inline(self, texts: Sequence[str], prompt: str, *, truncate: bool) -> list[TokenIds]:
        """Tokenise texts that are cheap; see ``encode_alone``."""
        ids = []
        for index, text in enumerate(texts):
            encoding = self.encode_alone(prompt + text, f"input[{index}]")
            ids.append(self.framed(encoding.ids, 0, index, prompt, truncate=truncate))
        return ids

    def framed(
        self, content: list[int], beyond: int, index: int, prompt: str, *, truncate: bool
    ) -> TokenIds:
        """Return the ids of a text between the special tokens.

        Args:
            content: ids of the prompt and the text.
            beyond: estimate of how many ids follow them.
            index: of the text in its request.
            prompt: its ids alone are not embedded: every such text would get the same vector.
            truncate: see ``encode_now``.

        Raises:
            InvalidRequestError: the text is too long, or adds no token to the prompt.
        """
        if not beyond and content == self._ids_of_prompt(prompt):
            raise InvalidRequestError(
                f"input[{index}] contains nothing that the tokenizer turns into a token: white "
                "space and control characters alone cannot be embedded.",
                code="empty_input",
                param=f"input[{index}]",
            )
        lost = len(content) + beyond - self.room
        if lost > 0:
            if not truncate:
                raise InvalidRequestError(
                    f"input[{index}] has more than the {self.max_tokens} tokens that fit (prompt "
                    "and special tokens included): shorten it, or send truncate: true.",
                    code="input_too_long",
                    param=f"input[{index}]",
                )
            self._report_cut(lost)
            content = content[: self.room]
        return np.array([*self._head, *content, *self._tail], dtype=np.int32)

    def _ids_of_prompt(self, prompt: str) -> list[int]:
        """Return the ids of a prompt without a text; a model has a handful of prompts."""
        ids = self._prompt_ids.get(prompt)
        if ids is None:
            ids = self._tokenizer.encode(prompt, add_special_tokens=False).ids
            self._prompt_ids[prompt] = ids
        return ids


class Tokenization:
    """Tokenises the texts of one request in slices; one thread at a time uses it.

    Attributes:
        ids: ids of the texts that are complete, as ``TextTokenizer.encode_now`` returns them.
    """

    def __init__(
        self, tokenizer: TextTokenizer, texts: Sequence[str], prompt: str, *, truncate: bool
    ) -> None:
        """Prepare; ``step`` does the work."""
        self.ids: list[TokenIds] = []
        self._tokenizer = tokenizer
        self._texts = texts
        self._prompt = prompt
        self._truncate = truncate
        self._wanted = tokenizer.room if truncate else tokenizer.room + 1
        self._readable = self._wanted * MAX_TOKEN_WIDTH + GUARD - len(prompt)
        self._slice = MIN_SLICE
        self._content: list[int] = []  # of the text that is being tokenised
        self._offset = 0
        self._window = 0

    @property
    def characters(self) -> int:
        """Maximum number of characters that are read: a long text is read up to its limit."""
        readable = max(1, self._readable)
        if max(map(len, self._texts)) <= readable:  # five times as fast
            return sum(map(len, self._texts))
        return sum(min(len(text), readable) for text in self._texts)

    @property
    def done(self) -> bool:
        """Whether all texts are tokenised."""
        return len(self.ids) == len(self._texts)

    def step(self) -> tuple[int, bool]:
        """Tokenise one slice; return its characters, and whether all texts are tokenised.

        Raises:
            InvalidRequestError: see ``TextTokenizer.encode_now``.
        """
        began = time.perf_counter()
        text = self._texts[len(self.ids)]
        if self._offset or len(text) > self._slice:
            characters = self._step_in(text)
        else:
            characters = self._step_over()
        self._slice = next_slice(characters, time.perf_counter() - began)
        return characters, self.done

    def _step_over(self) -> int:
        """Tokenise the next short texts; return their characters."""
        start = stop = len(self.ids)
        characters = 0
        for text in self._texts[start : start + SLICE_TEXTS]:
            if stop > start and characters + len(text) > self._slice:
                break
            characters += len(text)
            stop += 1
        batch = [self._prompt + text for text in self._texts[start:stop]]
        where = f"input[{start}]" if stop == start + 1 else f"input[{start}] to input[{stop - 1}]"
        encodings = self._tokenizer.encode_batch(batch, where)
        for index, encoding in enumerate(encodings, start):
            self.ids.append(self._framed(encoding.ids, 0, index))
        return characters

    def _step_in(self, text: str) -> int:
        """Tokenise the next part of a long text; return its characters."""
        start = self._offset
        readable = min(len(text), self._readable)
        stop = min(start + max(self._window, self._slice), readable)
        cut = self._cut(text, start, stop)
        if cut is None:
            stop = min(max(stop, start + MAX_SLICE), readable)
            cut = self._cut(text, start, stop)
        if cut is None:
            return self._settle(text, start, stop)
        where = f"input[{len(self.ids)}]"
        (encoding,) = self._tokenizer.encode_batch([self._seen(text, start, cut)], where)
        self._add(encoding.ids, cut)
        if len(self._content) >= self._wanted or cut == len(text):
            self._finish(text)
        elif cut == readable:
            raise self._too_wide(text, cut)
        return cut - start

    def _cut(self, text: str, start: int, stop: int) -> int | None:
        """Return where the part of a text ends; None without a cut point up to ``stop``."""
        if stop == len(text):
            return stop
        if stop - start <= MAX_SLICE:
            return self._tokenizer.cut_points.last(text, start, stop)
        # Half of the window was searched before it was doubled.
        return self._tokenizer.cut_points.first(text, start + (stop - start) // 2, stop)

    def _settle(self, text: str, start: int, stop: int) -> int:
        """Tokenise a window without a cut point; return its characters.

        The text is finished if the window holds enough settled tokens; otherwise the next window is
        larger.
        """
        seen = self._seen(text, start, stop)
        until = _settled_until(seen)
        wanted = self._wanted - len(self._content)
        if until > 0:
            where = f"input[{len(self.ids)}]"
            ids, end = self._tokenizer.first_ids(seen, until, wanted, where)
            if len(ids) == wanted:
                self._add(ids, max(1, stop - len(seen) + end))
                self._finish(text)
                return stop - start
        if stop == self._readable:
            raise self._too_wide(text, stop)
        if stop - start >= MAX_WINDOW:
            raise self._without_cut_point(text, start, stop)
        self._window = 2 * (stop - start)
        return stop - start

    def _seen(self, text: str, start: int, stop: int) -> str:
        return text[start:stop] if start else self._prompt + text[:stop]

    def _add(self, ids: list[int], offset: int) -> None:
        self._content += ids
        self._offset = offset
        self._window = 0

    def _finish(self, text: str) -> None:
        """Add the ids of a long text, of which the rest is not needed."""
        rest = len(text) - self._offset
        beyond = max(1, round(len(self._content) * rest / self._offset)) if rest else 0
        self.ids.append(self._framed(self._content, beyond, len(self.ids)))
        self._content = []
        self._offset = 0

    def _framed(self, content: list[int], beyond: int, index: int) -> TokenIds:
        return self._tokenizer.framed(content, beyond, index, self._prompt, truncate=self._truncate)

    def _too_wide(self, text: str, read: int) -> InvalidRequestError:
        return self._too_long(
            f"has {len(text)} characters, of which the first {read} hold fewer than "
            f"{self._wanted} tokens, as white space does: shorten it."
        )

    def _without_cut_point(self, text: str, start: int, stop: int) -> InvalidRequestError:
        return self._too_long(
            f"has {len(text)} characters, and from character {start} to {stop} neither a place "
            f"where it can be cut nor {self._wanted - len(self._content)} tokens: shorten it, or "
            "send its parts as texts of their own."
        )

    def _too_long(self, reason: str) -> InvalidRequestError:
        where = f"input[{len(self.ids)}]"
        return InvalidRequestError(f"{where} {reason}", code="input_too_long", param=where)


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


def next_slice(characters: int, seconds: float) -> int:
    """Return the characters of the next slice, from what the last one took."""
    fitting = int(characters * SLICE_SECONDS / max(seconds, 1e-6))
    return min(max(fitting, MIN_SLICE), MAX_SLICE)
