"""Texts as token ids on disk: tokenised once, mapped into memory, gathered without loops."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from taskvec_train.files import reserve, whole_folder

CHUNK = 8192
"""Texts that are tokenised at a time."""

MULTIPLE = 16
"""Padded lengths are multiples of this: kernels like it, and compiled code sees few shapes."""

Texts = Sequence[tuple[str, str]]
"""(prompt, text): joined before they are tokenised, as they are when served."""


class TokenStore:
    """The token ids of many texts.

    Attributes:
        lengths: int64 [texts].
    """

    def __init__(self, folder: Path) -> None:
        """Map what ``write_tokens`` wrote."""
        self._ids: NDArray[np.int32] = np.load(folder / "ids.npy", mmap_mode="r")
        self._starts: NDArray[np.int64] = np.load(folder / "starts.npy")
        self.lengths = np.diff(self._starts)

    def __len__(self) -> int:
        return len(self.lengths)

    def padded(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Texts side by side, padded on the right with token 0.

        Args:
            rows: which texts, [n].

        Returns:
            int64 ids [n, length] and lengths [n].
        """
        lengths = self.lengths[rows]
        width = padded_length(lengths)
        places = np.arange(width)
        inside = places < lengths[:, None]
        flat = np.where(inside, self._starts[rows][:, None] + places, 0)
        return np.where(inside, self._ids[flat], 0).astype(np.int64), lengths


def padded_length(lengths: NDArray[np.int64]) -> int:
    """The width of a matrix that holds texts of these lengths."""
    return int(-(-lengths.max() // MULTIPLE) * MULTIPLE)


def tokens_of(home: Path, texts: Texts, tokenizer: Path, limit: int) -> TokenStore:
    """Tokenise texts, or find that it was done before.

    Args:
        home: folder of such stores; each is named after what it holds.
        texts: with their prompts.
        tokenizer: tokenizer.json.
        limit: tokens a text is cut to; what the tokenizer appends stays.

    Raises:
        TrainingError: the disk refuses it.
    """
    digest = hashlib.sha256(tokenizer.read_bytes() + limit.to_bytes(8, "little"))
    for prompt, text in texts:
        digest.update(f"{len(prompt)} {len(text)} {prompt}{text}".encode())
    folder = home / digest.hexdigest()[:24]
    if not folder.is_dir():
        with whole_folder(folder) as unfinished:
            _write(unfinished, texts, tokenizer, limit)
    return TokenStore(folder)


def _write(folder: Path, texts: Texts, file: Path, limit: int) -> None:
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.enable_truncation(limit)
    starts = [0]
    with (folder / "ids.raw").open("wb") as raw:
        for chunk in _chunks(texts):
            encoded = tokenizer.encode_batch_fast([prompt + text for prompt, text in chunk])
            for one in encoded:
                starts.append(starts[-1] + len(one.ids))
            flat = np.concatenate([np.array(one.ids, dtype=np.int32) for one in encoded])
            raw.write(flat.tobytes())
    ids = np.lib.format.open_memmap(
        folder / "ids.npy", mode="w+", dtype=np.int32, shape=(starts[-1],)
    )
    reserve(folder / "ids.npy")
    ids[:] = np.memmap(folder / "ids.raw", dtype=np.int32, mode="r")
    ids.flush()
    (folder / "ids.raw").unlink()
    np.save(folder / "starts.npy", np.array(starts, dtype=np.int64))


def _chunks(texts: Texts) -> Iterable[Texts]:
    return (texts[start : start + CHUNK] for start in range(0, len(texts), CHUNK))
