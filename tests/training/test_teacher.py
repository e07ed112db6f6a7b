"""The teacher's vectors on disk, and their cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from taskvec_train.teacher import Encoder, Teacher, load_teacher, text_ids, write_teacher_vectors
from taskvec_train.teacher_cache import TeacherCache
from tinytraining import TOPICS

WORDS = [f"{a} {b}" for words in TOPICS.values() for a in words for b in words]


@dataclass
class Counting:
    """A teacher that records the sizes of its batches, and may be interrupted."""

    teacher: Teacher
    max_batches: int = 10**9
    texts: list[int] = field(default_factory=list)

    @property
    def tokenizer(self) -> Path:
        return self.teacher.tokenizer

    @property
    def dimension(self) -> int:
        return self.teacher.dimension

    @property
    def limit(self) -> int:
        return self.teacher.limit

    def embed(self, ids: NDArray[np.int64], lengths: NDArray[np.int64]) -> Tensor:
        """Embed like the teacher; raise KeyboardInterrupt after ``max_batches``."""
        if len(self.texts) == self.max_batches:
            raise KeyboardInterrupt
        self.texts.append(len(ids))
        return self.teacher.embed(ids, lengths)


@pytest.fixture(scope="module")
def loaded(teacher: Path) -> Teacher:
    """Return the tiny teacher, loaded."""
    return load_teacher(str(teacher), 64, torch.device("cpu"))


def truth(teacher: Teacher, texts: list[str], folder: Path) -> NDArray[np.float16]:
    """Return vectors of texts, each from a batch of one."""
    vectors = write_teacher_vectors(teacher, texts, "", folder / "truth", 1)
    return vectors.vectors[vectors.find(text_ids(texts))]


def test_vectors_are_found_by_text(loaded: Teacher, tmp_path: Path) -> None:
    """Each text has its own unit vector, whatever the batches and the order."""
    vectors = write_teacher_vectors(loaded, WORDS[::-1], "", tmp_path / "all", 512)
    found = vectors.vectors[vectors.find(text_ids(WORDS))].astype(np.float32)
    assert np.abs(found - truth(loaded, WORDS, tmp_path)).max() < 0.02
    assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-2
    assert vectors.find(text_ids(["unknown"])).tolist() == [-1]


def test_an_interrupted_pass_resumes(loaded: Teacher, tmp_path: Path) -> None:
    """Vectors written before Ctrl-C are reused for the same texts, and only for those."""
    interrupted = Counting(loaded, max_batches=3)
    with pytest.raises(KeyboardInterrupt):
        write_teacher_vectors(interrupted, WORDS, "", tmp_path / "vectors", 256)
    assert not (tmp_path / "vectors").exists()
    other = Counting(loaded)
    write_teacher_vectors(other, WORDS[:50], "", tmp_path / "vectors", 256)
    assert sum(other.texts) == 50
    assert sorted(path.name for path in (tmp_path / "vectors").iterdir()) == [
        "ids.npy",
        "vectors.npy",
    ]
    with pytest.raises(KeyboardInterrupt):
        write_teacher_vectors(Counting(loaded, max_batches=3), WORDS, "", tmp_path / "again", 256)
    rest = Counting(loaded)
    vectors = write_teacher_vectors(rest, WORDS, "", tmp_path / "again", 256)
    assert sum(rest.texts) < len(WORDS)
    found = vectors.vectors[vectors.find(text_ids(WORDS))].astype(np.float32)
    assert np.abs(found - truth(loaded, WORDS, tmp_path)).max() < 0.02


def test_the_cache_computes_each_text_once(loaded: Teacher, tmp_path: Path) -> None:
    """Later calls reuse earlier vectors; another instruction gives another vector."""
    counting = Counting(loaded)

    def load() -> Encoder:
        return counting

    cache = TeacherCache(tmp_path / "cache", "tiny", load, 512)
    first = cache.vectors([("", text) for text in WORDS[:60]])
    second = cache.vectors([("", text) for text in [*WORDS[30:90], WORDS[0]]])
    assert sum(counting.texts) == 90
    assert np.array_equal(first(np.array([30, 0])), second(np.array([0, 60])))
    mixed = cache.vectors([("", WORDS[0]), ("query ", WORDS[0])])
    assert sum(counting.texts) == 91
    plain, prompted = mixed(np.array([0, 1]))
    assert np.array_equal(plain, first(np.array([0]))[0])
    assert plain @ prompted < 0.999
