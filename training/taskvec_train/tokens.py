"""Token ids of texts on disk: tokenised once, memory-mapped, gathered with numpy."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from taskvec_train.files import atomic_folder, reserve_space

CHUNK_TEXTS = 8192
"""Texts that are tokenised at a time."""

PAD_MULTIPLE = 16
"""Padded lengths are multiples of this: kernels are faster, and compiled code has few shapes."""

Texts = Sequence[tuple[str, str]]
"""(prompt, text), concatenated before tokenising, as the service does."""


class TokenStore:
    """Token ids of many texts, memory-mapped.

    Attributes:
        lengths: int64 [texts], tokens of each text.
    """

    def __init__(self, folder: Path) -> None:
        """Open what ``tokens_of`` wrote."""
        self._ids: NDArray[np.int32] = np.load(folder / "ids.npy", mmap_mode="r")
        self._starts: NDArray[np.int64] = np.load(folder / "starts.npy")
        self.lengths = np.diff(self._starts)

    def __len__(self) -> int:
        return len(self.lengths)

    def padded(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return texts as a matrix, padded on the right with token 0.

        Args:
            rows: int64 [n], rows of texts.

        Returns:
            int64 ids [n, length] and int64 lengths [n].
        """
        lengths = self.lengths[rows]
        width = padded_length(lengths)
        positions = np.arange(width)
        mask = positions < lengths[:, None]
        flat = np.where(mask, self._starts[rows][:, None] + positions, 0)
        return np.where(mask, self._ids[flat], 0).astype(np.int64), lengths


def padded_length(lengths: NDArray[np.int64]) -> int:
    """Return the padded length of texts of these lengths."""
    return int(-(-lengths.max() // PAD_MULTIPLE) * PAD_MULTIPLE)


def tokens_of(folder: Path, texts: Texts, tokenizer: Path, limit: int) -> TokenStore:
    """Tokenise texts, or open the store that an earlier call wrote.

    Args:
        folder: of all stores; each is named by a digest of its texts and tokenizer.
        texts: (prompt, text).
        tokenizer: path of tokenizer.json.
        limit: maximum number of tokens of a text, special tokens included.

    Raises:
        TrainingError: a file cannot be written.
    """
    digest = hashlib.sha256(tokenizer.read_bytes() + limit.to_bytes(8, "little"))
    for prompt, text in texts:
        digest.update(f"{len(prompt)} {len(text)} {prompt}{text}".encode())
    store = folder / digest.hexdigest()[:24]
    if not store.is_dir():
        with atomic_folder(store) as unfinished:
            _write(unfinished, texts, tokenizer, limit)
    return TokenStore(store)


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
    reserve_space(folder / "ids.npy")
    ids[:] = np.memmap(folder / "ids.raw", dtype=np.int32, mode="r")
    ids.flush()
    (folder / "ids.raw").unlink()
    np.save(folder / "starts.npy", np.array(starts, dtype=np.int64))


def _chunks(texts: Texts) -> Iterable[Texts]:
    return (texts[start : start + CHUNK_TEXTS] for start in range(0, len(texts), CHUNK_TEXTS))
