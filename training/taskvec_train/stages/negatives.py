"""Mine hard negatives of a run's pairs once, with the teacher's vectors."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from taskvec_train.batch_sources import VectorLookup
from taskvec_train.context import RunContext
from taskvec_train.data.mining import Mining, mine
from taskvec_train.data.records import Pair
from taskvec_train.files import atomic_file
from taskvec_train.recipe import Mine

_CHUNK_ROWS = 65_536


def mine_negatives(
    context: RunContext, options: Mine, pairs: Sequence[Pair], query: str, document: str
) -> list[Pair]:
    """Return the pairs with negatives from the positives of all pairs.

    The result is stored in the run's folder as int32 [pairs, count]: indices among the distinct
    positives, padded with -1.

    Args:
        context: of the run.
        options: definition of a hard negative.
        pairs: existing negatives are replaced.
        query: the teacher's instruction for anchors.
        document: the teacher's instruction for positives.
    """
    digest = hashlib.sha256(f"{options!r} {query!r} {document!r}".encode())
    for pair in pairs:
        digest.update(f"{len(pair.anchor)} {pair.anchor}{pair.positive}".encode())
    texts = list(dict.fromkeys(pair.positive for pair in pairs))
    file = context.folder / "mined" / f"{digest.hexdigest()[:24]}.npy"
    with context.accelerator.main_process_first():
        if not file.is_file():
            anchors = context.teacher_cache.vectors([(query, pair.anchor) for pair in pairs])
            positives = context.teacher_cache.vectors([(document, pair.positive) for pair in pairs])
            found = mine(
                pairs,
                _matrix(anchors, len(pairs)),
                _matrix(positives, len(pairs)),
                Mining(**options.model_dump()),
                device=str(context.accelerator.device),
            )
            indices = {text: index for index, text in enumerate(texts)}
            rows = np.full((len(pairs), options.count), -1, dtype=np.int32)
            for row, pair in zip(rows, found, strict=True):
                row[: len(pair.negatives)] = [indices[text] for text in pair.negatives]
            with atomic_file(file) as unfinished, unfinished.open("wb") as stream:
                np.save(stream, rows)
    return [
        replace(pair, negatives=tuple(texts[index] for index in row if index >= 0))
        for pair, row in zip(pairs, np.load(file).tolist(), strict=True)
    ]


def _matrix(vectors: VectorLookup, count: int) -> NDArray[np.float16]:
    """Return all vectors as float16 [count, dimension]."""
    starts = range(0, count, _CHUNK_ROWS)
    chunks = (np.arange(start, min(start + _CHUNK_ROWS, count)) for start in starts)
    return np.concatenate([vectors(rows).astype(np.float16) for rows in chunks])
