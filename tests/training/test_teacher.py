"""The teacher's vectors on disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from taskvec_train.pool import TeacherPool
from taskvec_train.teacher import Encoder, Teacher, load_teacher, teach, text_ids
from tinytraining import TOPICS

WORDS = [f"{a} {b}" for words in TOPICS.values() for a in words for b in words]


@dataclass
class Counting:
    """A teacher that counts what it is asked, and may be interrupted."""

    teacher: Teacher
    patience: int = 10**9
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
        """As the teacher, until patience ends."""
        if len(self.texts) == self.patience:
            raise KeyboardInterrupt
        self.texts.append(len(ids))
        return self.teacher.embed(ids, lengths)


@pytest.fixture(scope="module")
def loaded(teacher: Path) -> Teacher:
    """The tiny teacher, ready."""
    return load_teacher(str(teacher), 64, torch.device("cpu"))


def truth(teacher: Teacher, texts: list[str], room: Path) -> NDArray[np.float16]:
    """Vectors of texts, each in a batch of its own."""
    vectors = teach(teacher, texts, "", room / "truth", 1)
    return vectors.vectors[vectors.find(text_ids(texts))]


def test_vectors_are_found_by_text(loaded: Teacher, tmp_path: Path) -> None:
    """Whatever the batches and the order, each text has its own unit vector."""
    vectors = teach(loaded, WORDS[::-1], "", tmp_path / "all", 512)
    found = vectors.vectors[vectors.find(text_ids(WORDS))].astype(np.float32)
    assert np.abs(found - truth(loaded, WORDS, tmp_path)).max() < 0.02
    assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-2
    assert vectors.find(text_ids(["unknown"])).tolist() == [-1]


def test_an_interrupted_pass_goes_on(loaded: Teacher, tmp_path: Path) -> None:
    """What was written before Ctrl-C is kept for the same texts, and for those alone."""
    cut = Counting(loaded, patience=3)
    with pytest.raises(KeyboardInterrupt):
        teach(cut, WORDS, "", tmp_path / "vectors", 256)
    assert not (tmp_path / "vectors").exists()
    other = Counting(loaded)
    teach(other, WORDS[:50], "", tmp_path / "vectors", 256)
    assert sum(other.texts) == 50
    assert sorted(path.name for path in (tmp_path / "vectors").iterdir()) == [
        "ids.npy",
        "vectors.npy",
    ]
    with pytest.raises(KeyboardInterrupt):
        teach(Counting(loaded, patience=3), WORDS, "", tmp_path / "again", 256)
    rest = Counting(loaded)
    vectors = teach(rest, WORDS, "", tmp_path / "again", 256)
    assert sum(rest.texts) < len(WORDS)
    found = vectors.vectors[vectors.find(text_ids(WORDS))].astype(np.float32)
    assert np.abs(found - truth(loaded, WORDS, tmp_path)).max() < 0.02


def test_a_pool_asks_for_each_text_once(loaded: Teacher, tmp_path: Path) -> None:
    """Later stages find what earlier ones asked; another instruction is another vector."""
    counting = Counting(loaded)

    def load() -> Encoder:
        return counting

    pool = TeacherPool(tmp_path / "pool", "tiny", load, 512)
    first = pool.vectors([("", text) for text in WORDS[:60]])
    second = pool.vectors([("", text) for text in [*WORDS[30:90], WORDS[0]]])
    assert sum(counting.texts) == 90
    assert np.array_equal(first(np.array([30, 0])), second(np.array([0, 60])))
    mixed = pool.vectors([("", WORDS[0]), ("query ", WORDS[0])])
    assert sum(counting.texts) == 91
    plain, prompted = mixed(np.array([0, 1]))
    assert np.array_equal(plain, first(np.array([0]))[0])
    assert plain @ prompted < 0.999
