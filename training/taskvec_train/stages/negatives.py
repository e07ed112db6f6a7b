"""Hard negatives for pairs, found once with the teacher's vectors of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from taskvec_train.data.mining import Mining, mine
from taskvec_train.data.records import Pair
from taskvec_train.files import whole_file
from taskvec_train.recipe import Mine
from taskvec_train.sources import Vectors
from taskvec_train.workspace import Workspace

_ROWS_AT_ONCE = 65_536


def mined(
    space: Workspace, options: Mine, pairs: Sequence[Pair], query: str, document: str
) -> list[Pair]:
    """Pairs with negatives from the positives of all pairs.

    The run's folder keeps which ones: int32 [pairs, count], places among the distinct positives,
    -1 where a pair has no more.

    Args:
        space: the run.
        options: what counts as a hard negative.
        pairs: whose negatives, if they have any, are replaced.
        query: the teacher's instruction for anchors.
        document: and for positives.
    """
    digest = hashlib.sha256(f"{options!r} {query!r} {document!r}".encode())
    for pair in pairs:
        digest.update(f"{len(pair.anchor)} {pair.anchor}{pair.positive}".encode())
    texts = list(dict.fromkeys(pair.positive for pair in pairs))
    file = space.folder / "mined" / f"{digest.hexdigest()[:24]}.npy"
    with space.accelerator.main_process_first():
        if not file.is_file():
            anchors = space.pool.vectors([(query, pair.anchor) for pair in pairs])
            positives = space.pool.vectors([(document, pair.positive) for pair in pairs])
            found = mine(
                pairs,
                _matrix(anchors, len(pairs)),
                _matrix(positives, len(pairs)),
                Mining(**options.model_dump()),
                device=str(space.accelerator.device),
            )
            places = {text: place for place, text in enumerate(texts)}
            rows = np.full((len(pairs), options.count), -1, dtype=np.int32)
            for row, pair in zip(rows, found, strict=True):
                row[: len(pair.negatives)] = [places[text] for text in pair.negatives]
            with whole_file(file) as unfinished, unfinished.open("wb") as stream:
                np.save(stream, rows)
    return [
        replace(pair, negatives=tuple(texts[place] for place in row if place >= 0))
        for pair, row in zip(pairs, np.load(file).tolist(), strict=True)
    ]


def _matrix(vectors: Vectors, count: int) -> NDArray[np.float16]:
    """All vectors, in float16 [count, dimension]."""
    starts = range(0, count, _ROWS_AT_ONCE)
    parts = (np.arange(start, min(start + _ROWS_AT_ONCE, count)) for start in starts)
    return np.concatenate([vectors(rows).astype(np.float16) for rows in parts])
