"""Cache of the teacher's vectors on disk, shared by all stages of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from taskvec_train.batch_sources import FloatArray, VectorLookup
from taskvec_train.batches import Rows
from taskvec_train.teacher import Encoder, TeacherVectors, text_ids, write_teacher_vectors
from taskvec_train.tokens import Texts


class TeacherCache:
    """Vectors by (instruction, text); missing ones are computed and stored as a new part."""

    def __init__(
        self, folder: Path, name: str, load: Callable[[], Encoder], batch_tokens: int
    ) -> None:
        """Open a cache; the teacher is loaded only when vectors are missing.

        Args:
            folder: of the cache.
            name: of the teacher; part of the cache key.
            load: loads the teacher; called at most once.
            batch_tokens: maximum number of tokens of one of the teacher's batches.
        """
        self._folder, self._name, self._load = folder, name, load
        self._batch_tokens = batch_tokens
        self._encoder: Encoder | None = None

    def vectors(self, texts: Texts) -> VectorLookup:
        """Return a lookup of the teacher's vectors by index in ``texts``.

        Args:
            texts: (instruction, text); may repeat.

        Raises:
            TrainingError: the teacher is missing, or its vectors cannot be written.
        """
        found: list[tuple[TeacherVectors, Rows]] = []
        for instruction in dict.fromkeys(instruction for instruction, _ in texts):
            rows = np.array([i for i, (other, _) in enumerate(texts) if other == instruction])
            for part, positions in self._parts([texts[i][1] for i in rows.tolist()], instruction):
                part_rows = np.full(len(texts), -1, dtype=np.int64)
                part_rows[rows] = positions
                found.append((part, part_rows))
        return _Lookup(found)

    def _parts(self, texts: Sequence[str], instruction: str) -> list[tuple[TeacherVectors, Rows]]:
        """Return the parts with vectors of these texts, and the row of each text in each, or -1."""
        key = hashlib.sha256(f"{self._name}\n{instruction}".encode()).hexdigest()[:16]
        folder = self._folder / key
        ids = text_ids(texts)
        parts = [TeacherVectors(path) for path in sorted(folder.glob("part-*"))]
        found = [(part, part.find(ids)) for part in parts]
        known = np.zeros(len(ids), dtype=bool)
        for _, rows in found:
            known |= rows >= 0
        if not known.all():
            missing = [texts[i] for i in np.flatnonzero(~known).tolist()]
            self._encoder = self._encoder or self._load()
            new = folder / f"part-{len(parts):04}"
            part = write_teacher_vectors(
                self._encoder, missing, instruction, new, self._batch_tokens
            )
            found.append((part, part.find(ids)))
        return found


class _Lookup:
    """VectorLookup from several parts."""

    def __init__(self, parts: Sequence[tuple[TeacherVectors, Rows]]) -> None:
        self._parts = parts
        self._dimension = parts[0][0].vectors.shape[1]

    def __call__(self, rows: Rows) -> FloatArray:
        found = np.empty((len(rows), self._dimension), dtype=np.float32)
        for part, part_rows in self._parts:
            selected = part_rows[rows]
            present = selected >= 0
            found[present] = part.vectors[selected[present]]
        return found
