"""Batch plans, and the content of batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from taskvec_train.batch_sources import GroupSource, PairSource
from taskvec_train.batches import BatchPlan
from taskvec_train.data.records import DataError
from taskvec_train.tokens import PAD_MULTIPLE, TokenStore, tokens_of

LENGTHS = np.random.default_rng(0).integers(1, 200, 1000)


def orthogonal_vectors(rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return orthogonal teacher vectors: every text is unlike any other."""
    return np.eye(200, dtype=np.float32)[rows]


@pytest.fixture
def store(teacher: Path, tmp_path: Path) -> TokenStore:
    """Return a store of sixty texts of growing length."""
    texts = [("query ", " ".join(["snow"] * n)) for n in range(60)]
    return tokens_of(tmp_path, texts, teacher / "tokenizer.json", 32)


@pytest.mark.parametrize("epoch", [0, 3])
def test_an_epoch_has_every_text_once_in_batches_within_the_budget(epoch: int) -> None:
    """Batches keep to the token budget, padding included, and have little padding."""
    batches = BatchPlan(LENGTHS, seed=1, tokens=2000).epoch(epoch)
    assert sorted(np.concatenate(batches)) == list(range(1000))
    padded = [
        len(rows) * -(-LENGTHS[rows].max() // PAD_MULTIPLE) * PAD_MULTIPLE for rows in batches
    ]
    assert max(padded) <= 2000
    assert LENGTHS.sum() / sum(padded) > 0.85


def test_batches_of_a_fixed_size_are_complete() -> None:
    """All batches have the fixed size; the remaining rows are left out of the epoch."""
    batches = BatchPlan(LENGTHS, seed=1, items=64).epoch(0)
    assert {len(rows) for rows in batches} == {64}
    assert len(batches) == 1000 // 64


def test_epochs_and_seeds_differ_and_repeat() -> None:
    """The batches depend on the seed and the epoch, and on nothing else."""
    plan = BatchPlan(LENGTHS, seed=1, items=10)

    def first(plan: BatchPlan, epoch: int) -> list[int]:
        return plan.epoch(epoch)[0].tolist()

    assert first(plan, 0) == first(BatchPlan(LENGTHS, seed=1, items=10), 0)
    assert first(plan, 0) != first(plan, 1)
    assert first(plan, 0) != first(BatchPlan(LENGTHS, seed=2, items=10), 0)


def test_batches_are_split_among_processes() -> None:
    """Each process gets the same number of batches, and no text goes to two processes."""
    plans = [BatchPlan(LENGTHS, seed=1, tokens=2000, rank=r, processes=3) for r in range(3)]
    parts = [plan.epoch(0) for plan in plans]
    assert len({len(part) for part in parts}) == 1
    rows = np.concatenate([rows for part in parts for rows in part])
    assert len(set(rows.tolist())) == len(rows)


def test_too_little_data_is_refused() -> None:
    """Fewer records than a batch for every process, or a text longer than a batch, is an error."""
    with pytest.raises(DataError, match="1000 records are fewer than a batch of 600 for each of 2"):
        BatchPlan(LENGTHS, seed=1, items=600, processes=2).check("pairs")
    with pytest.raises(DataError, match="does not fit into a batch of 100"):
        BatchPlan(LENGTHS, seed=1, tokens=100).check("texts")


def test_token_stores_truncate_pad_and_are_reused(
    store: TokenStore, teacher: Path, tmp_path: Path
) -> None:
    """Truncated texts keep the appended token; the same texts are not tokenised twice."""
    rows = np.array([0, 59, 3])
    ids, lengths = store.padded(rows)
    assert ids.shape == (3, 32)
    assert lengths.tolist() == [3, 32, 6]
    end = ids[0, 2]
    assert ids[1, 31] == end
    assert not ids[0, 3:].any()
    before = sorted(tmp_path.iterdir())
    texts = [("query ", " ".join(["snow"] * n)) for n in range(60)]
    tokens_of(tmp_path, texts, teacher / "tokenizer.json", 32)
    assert sorted(tmp_path.iterdir()) == before


def test_false_negatives_are_ignored(store: TokenStore) -> None:
    """Equal texts, other answers to the same query, and likely answers are ignored."""
    pairs = np.array([[0, 10], [0, 11], [1, 12], [2, 12], [3, 13]])
    negatives = np.array([[20, -1], [21, 22], [10, -1], [23, 24], [-1, -1]])

    def teacher(rows: NDArray[np.int64]) -> NDArray[np.float32]:
        vectors = orthogonal_vectors(np.where(rows < 20, rows % 10, rows))  # row 1x answers row x
        return np.where((rows == 21)[:, None], orthogonal_vectors(np.full_like(rows, 3)), vectors)

    plan = BatchPlan(store.lengths[pairs[:, 0]], seed=0, items=5)
    source = PairSource(
        plan, "pairs", store, pairs, negatives=negatives, teacher=teacher, hard=1, margin=0.95
    )
    batch = source.batch(0)
    order = plan.epoch(0)[0].tolist()
    ignored = batch["ignored"].numpy()
    assert ignored.shape[1] == 5 + 4  # one hard negative for each pair that has one
    assert not ignored.diagonal().any()
    assert ignored[order.index(0), order.index(1)]  # the same query
    assert ignored[order.index(2), order.index(3)]  # the same text
    assert not ignored[order.index(4), order.index(0)]


def test_groups_have_one_positive_and_negatives_of_other_labels(store: TokenStore) -> None:
    """The positive has the label of the text, every negative another one."""
    labels = [str(n % 3) if n < 50 else "rare" for n in range(60)]
    source = GroupSource(
        BatchPlan(store.lengths, seed=0, items=20), "texts", store, labels, negatives=4
    )
    for number in range(12):
        batch = source.batch(number)
        grouped = batch["labels"].numpy()
        assert (grouped[:, 0] == grouped[:, 1]).all()
        assert (grouped[:, 0][:, None] != grouped[:, 2:]).all()
        assert batch["ids"].shape[0] == 20 * 6


def test_a_batch_depends_only_on_its_number(store: TokenStore) -> None:
    """Batch 100 is the same after a hundred others and by itself."""

    def source() -> GroupSource:
        labels = [str(n % 3) for n in range(60)]
        plan = BatchPlan(store.lengths, seed=0, items=20)
        return GroupSource(plan, "texts", store, labels, negatives=4)

    used = source()
    for number in range(100):
        used.batch(number)
    alone, after = source().batch(100), used.batch(100)
    assert all((alone[name] == after[name]).all() for name in alone)
