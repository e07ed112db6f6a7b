"""Mine hard negatives: texts that are similar to a query, but do not answer it.

A candidate that is nearly as similar as the positive is probably an unlabelled answer, and is left
out ("positive-aware" mining of NV-Retriever, Moreira et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from taskvec_train.data.duplicates import fingerprint, is_near_duplicate
from taskvec_train.data.records import DataError, Pair

Matrix = NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class Mining:
    """Definition of a hard negative.

    Texts are ranked by similarity to the anchor, without its answers. Candidates have ranks from
    `first` to `last` (from 0, `last` excluded) and a similarity below `share` of the positive's;
    the `count` most similar candidates are the negatives.
    """

    count: int = 7
    share: float = 0.95
    first: int = 0
    last: int = 100
    chunk: int = 4096
    """Anchors and texts of one matrix product; memory grows with its square."""

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.last or self.count < 1 or not 0 < self.share <= 1:
            raise DataError(f"{self}: must have 0 <= first < last, count >= 1 and 0 < share <= 1.")


def load_vectors(path: Path, rows: int) -> Matrix:
    """Memory-map a .npy matrix. Raises DataError if it has another number of rows."""
    try:
        vectors: Matrix = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: is not a readable .npy file ({error}).") from None
    if vectors.ndim != 2 or len(vectors) != rows:
        raise DataError(
            f"{path}: has the shape {vectors.shape}, but must have {rows} rows, one for each pair. "
            "Embed the data again."
        )
    return vectors


def mine(
    pairs: Sequence[Pair],
    anchors: Matrix,
    positives: Matrix,
    mining: Mining,
    *,
    device: str = "cpu",
    advance: Callable[[int], None] | None = None,
) -> Iterator[Pair]:
    """Yield the pairs with their hard negatives, taken from the positives of all pairs.

    `anchors` and `positives` are the teacher's vectors, one row a pair, normalised or not. Raises
    DataError if their shapes do not fit.
    """
    if anchors.shape != positives.shape or len(anchors) != len(pairs):
        raise DataError(
            f"{len(pairs)} pairs, anchors of shape {anchors.shape}, positives of shape "
            f"{positives.shape}: must have one row a pair and equal dimensions."
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
    """Return the distinct texts, and the first row of each."""
    rows: dict[str, int] = {}
    for row, text in enumerate(texts):
        rows.setdefault(text, row)
    return list(rows), np.fromiter(rows.values(), np.intp, len(rows))


def _answers(pairs: Sequence[Pair]) -> dict[str, set[str]]:
    """Return for each anchor its positives in all pairs."""
    answers: dict[str, set[str]] = {}
    for pair in pairs:
        answers.setdefault(pair.anchor, set()).add(pair.positive)
    return answers


def _normalised(rows: Matrix, device: str) -> torch.Tensor:
    tensor = torch.from_numpy(np.array(rows, np.float32)).to(device)
    return torch.nn.functional.normalize(tensor, dim=1)


def _nearest(
    queries: torch.Tensor, vectors: Matrix, rows: NDArray[np.intp], count: int, chunk: int
) -> list[tuple[list[float], list[int]]]:
    """Return for each query the `count` best scores and their positions in `rows`, best first."""
    best = torch.empty(len(queries), 0, device=queries.device)
    positions = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(rows), chunk):
        block = _normalised(vectors[rows[start : start + chunk]], str(queries.device))
        scores, indices = (queries @ block.T).topk(min(count, len(block)), dim=1)
        best = torch.cat([best, scores], dim=1)
        positions = torch.cat([positions, indices + start], dim=1)
        best, order = best.topk(min(count, best.shape[1]), dim=1)
        positions = positions.gather(1, order)
    return list(zip(best.tolist(), positions.tolist(), strict=True))


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
        if score < limit and not is_near_duplicate(text, known)
    )
    return tuple(islice(chosen, mining.count))
