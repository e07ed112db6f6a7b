"""The teacher's vectors of all stages: each text is asked for once, then found on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from taskvec_train.batches import Rows
from taskvec_train.sources import Numbers, Vectors
from taskvec_train.teacher import Encoder, TeacherVectors, teach, text_ids
from taskvec_train.tokens import Texts


class TeacherPool:
    """Grows by a part for what it is asked for and does not know."""

    def __init__(
        self, home: Path, name: str, load: Callable[[], Encoder], batch_tokens: int
    ) -> None:
        """Wire it.

        Args:
            home: where parts are kept.
            name: of the teacher; another name finds nothing of this one.
            load: called when the teacher is needed, once.
            batch_tokens: most tokens of one of its batches.
        """
        self._home, self._name, self._load = home, name, load
        self._batch_tokens = batch_tokens
        self._encoder: Encoder | None = None

    def vectors(self, texts: Texts) -> Vectors:
        """The teacher's vectors, by place in ``texts``.

        Args:
            texts: (instruction, text), may repeat.

        Raises:
            TrainingError: the teacher is missing, or the disk refuses its vectors.
        """
        found: list[tuple[TeacherVectors, Rows]] = []
        for instruction in dict.fromkeys(instruction for instruction, _ in texts):
            rows = np.array([i for i, (asked, _) in enumerate(texts) if asked == instruction])
            for part, places in self._parts([texts[i][1] for i in rows.tolist()], instruction):
                everywhere = np.full(len(texts), -1, dtype=np.int64)
                everywhere[rows] = places
                found.append((part, everywhere))
        return _Lookup(found)

    def _parts(self, texts: Sequence[str], instruction: str) -> list[tuple[TeacherVectors, Rows]]:
        """What has vectors of these texts, with the row of each text in it or -1."""
        key = hashlib.sha256(f"{self._name}\n{instruction}".encode()).hexdigest()[:16]
        home = self._home / key
        ids = text_ids(texts)
        parts = [TeacherVectors(folder) for folder in sorted(home.glob("part-*"))]
        found = [(part, part.find(ids)) for part in parts]
        known = np.zeros(len(ids), dtype=bool)
        for _, places in found:
            known |= places >= 0
        if not known.all():
            missing = [texts[i] for i in np.flatnonzero(~known).tolist()]
            self._encoder = self._encoder or self._load()
            folder = home / f"part-{len(parts):04}"
            part = teach(self._encoder, missing, instruction, folder, self._batch_tokens)
            found.append((part, part.find(ids)))
        return found


class _Lookup:
    """Vectors from several parts."""

    def __init__(self, parts: Sequence[tuple[TeacherVectors, Rows]]) -> None:
        self._parts = parts
        self._dimension = parts[0][0].vectors.shape[1]

    def __call__(self, rows: Rows) -> Numbers:
        found = np.empty((len(rows), self._dimension), dtype=np.float32)
        for part, places in self._parts:
            here = places[rows]
            inside = here >= 0
            found[inside] = part.vectors[here[inside]]
        return found
