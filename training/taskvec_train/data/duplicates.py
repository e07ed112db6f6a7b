"""Find near-duplicate texts by MinHash over word shingles (Broder, 1997)."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

SHINGLE = 3
"""Number of words of a shingle."""
BANDS = 6
ROWS = 4
"""Two texts are compared if all ROWS minima of at least one of BANDS bands are equal."""
THRESHOLD = 0.8
"""Minimum Jaccard similarity of the shingles of near-duplicates."""
_CHUNK = 20_000
_WORD = re.compile(r"\w+")

Shingles = NDArray[np.uint32]


def fingerprint(text: str) -> Shingles:
    """Return the sorted hashes of a text's shingles; one hash for a shorter text.

    Case, the values of digits, and punctuation are ignored.
    """
    words = [zlib.crc32(word.encode()) for word in _WORD.findall(re.sub(r"\d+", "0", text.lower()))]
    hashes = np.array(words, np.uint32)
    if len(hashes) <= SHINGLE:
        return np.array([zlib.crc32(hashes.tobytes())], np.uint32)
    mixed = np.zeros(len(hashes) - SHINGLE + 1, np.uint32)
    for offset in range(SHINGLE):
        mixed = mixed * np.uint32(0x9E3779B1) + hashes[offset : offset + len(mixed)]
    return np.unique(mixed)


def jaccard(one: Shingles, other: Shingles) -> float:
    """Return the Jaccard similarity of two fingerprints."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


def is_near_duplicate(text: str, known: Iterable[Shingles]) -> bool:
    """Return whether a text is a near-duplicate of one with these fingerprints."""
    shingles = fingerprint(text)
    return any(jaccard(shingles, other) >= THRESHOLD for other in known)


class DuplicateIndex:
    """Index of texts; finds the earlier near-duplicate of a text."""

    def __init__(self) -> None:
        multipliers = np.random.default_rng(1).integers(1, 1 << 63, BANDS * ROWS, np.uint64)
        self._multipliers = multipliers * np.uint64(2) + np.uint64(1)
        self._buckets: list[dict[int, int]] = [{} for _ in range(BANDS)]
        self._fingerprints: list[Shingles] = []

    @property
    def size(self) -> int:
        """Number of texts added."""
        return len(self._fingerprints)

    def add(self, texts: Sequence[str]) -> list[int | None]:
        """Add texts; return for each the number of an earlier near-duplicate, or None.

        Texts are numbered from 0, in the order in which they were added.
        """
        found: list[int | None] = []
        for start in range(0, len(texts), _CHUNK):
            found.extend(self._add_chunk(texts[start : start + _CHUNK]))
        return found

    def _add_chunk(self, texts: Sequence[str]) -> list[int | None]:
        fingerprints = [fingerprint(text) for text in texts]
        return [
            self._add(shingles, keys)
            for shingles, keys in zip(fingerprints, self._band_keys(fingerprints), strict=True)
        ]

    def _band_keys(self, fingerprints: Sequence[Shingles]) -> list[list[int]]:
        """Return BANDS keys for each fingerprint, each a hash of ROWS minima."""
        lengths = [len(shingles) for shingles in fingerprints]
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        flat = np.concatenate(fingerprints).astype(np.uint64)
        keys = np.zeros((len(fingerprints), BANDS), np.uint64)
        for number, multiplier in enumerate(self._multipliers):
            mixed = flat * multiplier
            minima = np.minimum.reduceat(mixed ^ (mixed >> np.uint64(29)), starts)
            band = number // ROWS
            keys[:, band] = keys[:, band] * np.uint64(0x9E3779B97F4A7C15) + minima
        rows: list[list[int]] = keys.tolist()
        return rows

    def _add(self, shingles: Shingles, keys: Sequence[int]) -> int | None:
        number = len(self._fingerprints)
        self._fingerprints.append(shingles)
        earlier = None
        for bucket, key in zip(self._buckets, keys, strict=True):
            candidate = bucket.setdefault(key, number)
            if earlier is None and candidate != number:
                same = jaccard(shingles, self._fingerprints[candidate]) >= THRESHOLD
                earlier = candidate if same else None
        return earlier
