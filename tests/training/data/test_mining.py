"""Mining of hard negatives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from taskvec_train.data.mining import Mining, load_vectors, mine
from taskvec_train.data.records import DataError, Pair

TEXTS = [
    "Tigers are the largest cats and hunt alone at night in the forests of Asia.",
    "Lions live in groups that are called prides, on the plains of Africa.",
    "Tigers are the largest cats and hunt alone at night in the forests of Asia!",
    "House cats sleep for most of the day.",
    "A bridge carries a road over a river.",
]
# Cosine to the anchor, which is (1, 0): TEXTS[0] is the positive of the first pair.
COSINES = [0.9, 0.8, 0.7, 0.6, 0.1]


def at(cosine: float) -> list[float]:
    return [cosine, (1 - cosine**2) ** 0.5]


POSITIVES = np.array([at(cosine) for cosine in COSINES], np.float32)
ANCHORS = np.tile(np.array([1.0, 0.0], np.float32), (5, 1))
PAIRS = [Pair(f"question {chr(97 + number)}", text) for number, text in enumerate(TEXTS)]


def first(mining: Mining, pairs: list[Pair] = PAIRS) -> tuple[str, ...]:
    return next(mine(pairs, ANCHORS, POSITIVES, mining)).negatives


def test_negatives_are_the_nearest_texts_that_do_not_repeat_the_positive():
    """The most similar texts come first, without near-duplicates of the positive."""
    assert first(Mining(count=2)) == (TEXTS[1], TEXTS[3])


def test_a_text_nearly_as_similar_as_the_positive_is_a_likely_answer():
    """Texts at or above the share of the positive's similarity are not taken."""
    assert first(Mining(count=2, share=0.8)) == (TEXTS[3], TEXTS[4])


def test_ranks_outside_the_window_are_ignored():
    """Ranks count from the most similar text, without the answers."""
    assert first(Mining(first=2, last=3)) == (TEXTS[3],)


def test_another_answer_to_the_same_query_is_not_a_negative():
    """The positive of another pair with the same anchor is not a negative."""
    pairs = [*PAIRS]
    pairs[1] = Pair(PAIRS[0].anchor, TEXTS[1])
    assert first(Mining(count=1), pairs) == (TEXTS[3],)


def test_a_text_of_several_pairs_is_taken_once():
    """A positive of several pairs is a single candidate."""
    pairs = [*PAIRS, Pair("question f", TEXTS[3])]
    anchors = np.vstack([ANCHORS, ANCHORS[:1]])
    positives = np.vstack([POSITIVES, POSITIVES[3:4]])
    found = next(mine(pairs, anchors, positives, Mining()))
    assert found.negatives == (TEXTS[1], TEXTS[3], TEXTS[4])


def test_chunks_change_nothing():
    """Small chunks give the same negatives as one chunk."""
    order = np.random.default_rng(5)
    pairs = [Pair(f"q {number} {'x' * number}", f"{'y' * number} t") for number in range(40)]
    anchors = order.normal(size=(40, 8)).astype(np.float16)
    positives = (anchors + order.normal(size=(40, 8))).astype(np.float16)
    whole = list(mine(pairs, anchors, positives, Mining()))
    parts = list(mine(pairs, anchors, positives, Mining(chunk=7)))
    assert whole == parts
    assert any(pair.negatives for pair in whole)


def test_vectors_are_mapped_and_counted(tmp_path: Path):
    """A matrix with a wrong number of rows, or another file, is an error that names the file."""
    file = tmp_path / "anchors.npy"
    np.save(file, ANCHORS)
    assert isinstance(load_vectors(file, 5), np.memmap)
    with pytest.raises(
        DataError, match=r"anchors\.npy: has the shape \(5, 2\), but must have 6 rows"
    ):
        load_vectors(file, 6)
    file.write_bytes(b"no matrix")
    with pytest.raises(DataError, match=r"anchors\.npy: is not a readable \.npy file"):
        load_vectors(file, 5)


def test_vectors_of_different_sizes_are_refused():
    """Anchors and positives must have one row a pair."""
    with pytest.raises(DataError, match="must have one row a pair"):
        next(mine(PAIRS, ANCHORS[:4], POSITIVES, Mining()))


@pytest.mark.parametrize(
    "wrong", [{"first": 5, "last": 5}, {"count": 0}, {"share": 0.0}, {"share": 1.1}]
)
def test_invalid_options_are_refused(wrong: dict[str, int]):
    """An empty window, no negatives, and a share outside 0 to 1 are refused."""
    with pytest.raises(DataError, match="must have 0 <= first < last"):
        Mining(**wrong)
