"""Hard negatives: texts that the teacher finds near a query, and that do not answer it.

A candidate nearly as similar as the positive is probably an answer nobody marked; it is left out
(as in NV-Retriever, Moreira et al. 2024, "positive-aware" mining).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from taskvec_train.data.duplicates import fingerprint, repeats
from taskvec_train.data.records import DataError, Pair

Vectors = NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class Mining:
    """What counts as a hard negative.

    Of the texts most similar to the anchor, those of ranks `first` to `last` (from 0, `last`
    excluded, the positive itself not counted) whose similarity is below `share` of the positive's;
    the `count` most similar ones are kept.
    """

    count: int = 7
    share: float = 0.95
    first: int = 0
    last: int = 100
    chunk: int = 4096
    """Anchors and texts of one product: memory is some chunk squared floats."""

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.last or self.count < 1 or not 0 < self.share <= 1:
            raise DataError(
                f"{self}: want 0 <= first < last, count of at least 1, share above 0 and up to 1."
            )


def load_vectors(path: Path, rows: int) -> Vectors:
    """Map a .npy matrix into memory. Raises DataError if it does not have so many rows."""
    try:
        vectors: Vectors = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: is no .npy file that can be read ({error}).") from None
    if vectors.ndim != 2 or len(vectors) != rows:
        raise DataError(
            f"{path}: has the shape {vectors.shape}, wanted are {rows} rows, one for each pair. "
            "Embed the data again."
        )
    return vectors


def mine(
    pairs: Sequence[Pair],
    anchors: Vectors,
    positives: Vectors,
    mining: Mining,
    *,
    device: str = "cpu",
    advance: Callable[[int], None] | None = None,
) -> Iterator[Pair]:
    """Yield the pairs with their hard negatives, taken from the positives of all pairs.

    `anchors` and `positives` hold the teacher's vectors, one row a pair, normalised or not. The
    same input gives the same output. Raises DataError for vectors of other sizes.
    """
    if anchors.shape != positives.shape or len(anchors) != len(pairs):
        raise DataError(
            f"{len(pairs)} pairs, anchors of shape {anchors.shape}, positives of shape "
            f"{positives.shape}: want one row a pair and equal dimensions."
        )
    texts, rows = _distinct([pair.positive for pair in pairs])
    answers = _answers(pairs)
    window = min(mining.last + max(map(len, answers.values()), default=0), len(texts))
    for start in range(0, len(pairs), mining.chunk):
        batch = pairs[start : start + mining.chunk]
        queries = _normalised(anchors[start : start + mining.chunk], device)
        own = _normalised(positives[start : start + mining.chunk], device)
        limits = ((queries * own).sum(1) * mining.share).tolist()
        nearest = _nearest(queries, positives, rows, window, mining.chunk)
        for pair, limit, (scores, found) in zip(batch, limits, nearest, strict=True):
            ranked = [(score, texts[at]) for score, at in zip(scores, found, strict=True)]
            chosen = _choose(pair, answers[pair.anchor], limit, ranked, mining)
            yield replace(pair, negatives=chosen)
        if advance:
            advance(len(batch))


def _distinct(texts: Sequence[str]) -> tuple[list[str], NDArray[np.intp]]:
    """Return every text once, and the first row of each."""
    rows: dict[str, int] = {}
    for row, text in enumerate(texts):
        rows.setdefault(text, row)
    return list(rows), np.fromiter(rows.values(), np.intp, len(rows))


def _answers(pairs: Sequence[Pair]) -> dict[str, set[str]]:
    """Return all texts marked as an answer to an anchor, in any of the pairs."""
    answers: dict[str, set[str]] = {}
    for pair in pairs:
        answers.setdefault(pair.anchor, set()).add(pair.positive)
    return answers


def _normalised(rows: Vectors, device: str) -> torch.Tensor:
    tensor = torch.from_numpy(np.array(rows, np.float32)).to(device)
    return torch.nn.functional.normalize(tensor, dim=1)


def _nearest(
    queries: torch.Tensor, vectors: Vectors, rows: NDArray[np.intp], count: int, chunk: int
) -> list[tuple[list[float], list[int]]]:
    """Return for each query the `count` best scores and their positions in `rows`, best first."""
    best = torch.empty(len(queries), 0, device=queries.device)
    places = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(rows), chunk):
        block = _normalised(vectors[rows[start : start + chunk]], str(queries.device))
        scores, here = (queries @ block.T).topk(min(count, len(block)), dim=1)
        best = torch.cat([best, scores], dim=1)
        places = torch.cat([places, here + start], dim=1)
        best, order = best.topk(min(count, best.shape[1]), dim=1)
        places = places.gather(1, order)
    return list(zip(best.tolist(), places.tolist(), strict=True))


def _choose(
    pair: Pair,
    answers: set[str],
    limit: float,
    ranked: Sequence[tuple[float, str]],
    mining: Mining,
) -> tuple[str, ...]:
    others = [(score, text) for score, text in ranked if text not in answers]
    known = [fingerprint(pair.anchor), fingerprint(pair.positive)]
    chosen = (
        text
        for score, text in others[mining.first : mining.last]
        if score < limit and not repeats(text, known)
    )
    return tuple(islice(chosen, mining.count))
