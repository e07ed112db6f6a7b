"""From tokenised records to batches of tensors: any batch at any time, by its number alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from taskvec_train.batches import BatchPlan, Rows
from taskvec_train.data.records import DataError
from taskvec_train.tokens import TokenStore

Numbers = NDArray[np.float32]
Tensors = dict[str, Tensor]


class Vectors(Protocol):
    """Looks up the teacher's vectors of a store's texts."""

    def __call__(self, rows: Rows) -> Numbers:
        """float32 [rows, dimension]."""
        ...


class Source(Protocol):
    """Batches for one stage."""

    def batch(self, number: int) -> Tensors:
        """A batch of this process, the same for the same number."""
        ...

    @property
    def per_epoch(self) -> int:
        """Batches in which every record comes once, about."""
        ...


class Planned:
    """A source over a plan: subclasses say how chosen rows become tensors."""

    def __init__(self, plan: BatchPlan, where: str) -> None:
        """Make the first epoch.

        Raises:
            DataError: there is not one batch.
        """
        plan.check(where)
        self._plan = plan
        self._epoch, self._batches = 0, plan.epoch(0)
        self._ends = [len(self._batches)]

    @property
    def per_epoch(self) -> int:
        return self._ends[0]

    def batch(self, number: int) -> Tensors:
        """Epochs follow on each other; each cuts its batches anew."""
        while number >= self._ends[-1]:
            self._open(len(self._ends))
            self._ends.append(self._ends[-1] + len(self._batches))
        epoch = int(np.searchsorted(self._ends, number, side="right"))
        if epoch != self._epoch:
            self._open(epoch)
        rows = self._batches[number - (self._ends[epoch - 1] if epoch else 0)]
        return self.assemble(
            rows, np.random.default_rng([self._plan.seed, self._plan.rank, number])
        )

    def _open(self, epoch: int) -> None:
        self._epoch, self._batches = epoch, self._plan.epoch(epoch)

    def assemble(self, rows: Rows, random: np.random.Generator) -> Tensors:
        """The tensors of these records; what is drawn at random comes from ``random``."""
        raise NotImplementedError


class TextSource(Planned):
    """Texts and the vectors to give them."""

    def __init__(
        self, plan: BatchPlan, where: str, store: TokenStore, chosen: Rows, teacher: Vectors
    ) -> None:
        """Wire it; ``plan`` counts the chosen rows of the store."""
        super().__init__(plan, where)
        self._store, self._chosen, self._teacher = store, chosen, teacher

    def assemble(self, rows: Rows, random: np.random.Generator) -> Tensors:
        del random
        rows = self._chosen[rows]
        return _texts(self._store, rows) | {"teacher": torch.from_numpy(self._teacher(rows))}


class PairSource(Planned):
    """Anchors, their positives, and hard negatives for all of the batch."""

    def __init__(
        self,
        plan: BatchPlan,
        where: str,
        store: TokenStore,
        pairs: Rows,
        *,
        negatives: Rows,
        teacher: Vectors,
        hard: int,
        margin: float,
    ) -> None:
        """Wire it.

        Args:
            plan: over the pairs.
            where: how errors call the data.
            store: all texts, anchors with one prompt and the others with another.
            pairs: [pairs, 2]: each anchor's and positive's row in the store.
            negatives: [pairs, most]: rows, filled up with -1.
            teacher: of the store's rows.
            hard: negatives drawn for each anchor.
            margin: a candidate whose teacher cosine to the anchor is above this part of the
                positive's is a false negative and ignored.
        """
        super().__init__(plan, where)
        self._store, self._teacher = store, teacher
        self._pairs, self._negatives = pairs, negatives
        self._hard = min(hard, negatives.shape[1])
        self._margin = margin

    def assemble(self, rows: Rows, random: np.random.Generator) -> Tensors:
        anchors, positives = self._pairs[rows].T
        drawn = self._drawn(rows, random)
        candidates = np.concatenate([positives, drawn[drawn >= 0]])
        x, y = self._teacher(anchors), self._teacher(candidates)
        ignored = self._false_negatives(anchors, candidates, x, y)
        return (
            _texts(self._store, anchors, "anchor_")
            | _texts(self._store, candidates, "candidate_")
            | {
                "ignored": torch.from_numpy(ignored),
                "anchor_teacher": torch.from_numpy(x),
                "positive_teacher": torch.from_numpy(y[: len(rows)]),
            }
        )

    def _drawn(self, rows: Rows, random: np.random.Generator) -> Rows:
        """[rows, hard] of the negatives; -1 where a pair has fewer."""
        given = self._negatives[rows]
        keys = random.random(given.shape)
        keys[given < 0] = 2  # last
        order = np.argsort(keys, axis=1)[:, : self._hard]
        drawn: Rows = np.take_along_axis(given, order, axis=1)
        return drawn

    def _false_negatives(
        self, anchors: Rows, candidates: Rows, x: Numbers, y: Numbers
    ) -> NDArray[np.bool_]:
        count = len(anchors)
        scores = x @ y.T
        ignored = scores > self._margin * scores.diagonal()[:, None]
        ignored |= candidates == candidates[:count, None]  # another anchor's, the same text
        ignored[:, :count] |= anchors == anchors[:, None]  # the same anchor, another positive
        np.fill_diagonal(ignored, val=False)
        return ignored


class ScoredSource(Planned):
    """Pairs of texts with scores."""

    def __init__(
        self, plan: BatchPlan, where: str, store: TokenStore, pairs: Rows, scores: Numbers
    ) -> None:
        """Wire it: ``pairs`` [records, 2] are rows of the store, ``scores`` [records]."""
        super().__init__(plan, where)
        self._store, self._pairs, self._scores = store, pairs, scores

    def assemble(self, rows: Rows, random: np.random.Generator) -> Tensors:
        del random
        a, b = self._pairs[rows].T
        scores = torch.from_numpy(self._scores[rows])
        return _texts(self._store, a, "a_") | _texts(self._store, b, "b_") | {"scores": scores}


class GroupSource(Planned):
    """Labelled texts, each with another one of its label and some of other labels."""

    def __init__(
        self,
        plan: BatchPlan,
        where: str,
        store: TokenStore,
        labels: Sequence[str],
        negatives: int,
    ) -> None:
        """Wire it.

        Args:
            plan: over the texts.
            where: how errors call the data.
            store: one text a label, in the order of ``labels``.
            labels: of each text.
            negatives: texts of other labels in a group.

        Raises:
            DataError: a label has one text only, or all texts have the same.
        """
        super().__init__(plan, where)
        self._store, self._count = store, negatives
        names, self._labels, sizes = np.unique(labels, return_inverse=True, return_counts=True)
        if len(names) < 2:
            raise DataError(
                f"{where}: all texts have the label {str(names[0])!r}: give a second label."
            )
        if sizes.min() < 2:
            raise DataError(
                f"{where}: the label {str(names[sizes.argmin()])!r} has one text only, so nothing "
                "can be its positive: give it a second text, or leave it out."
            )
        self._sizes = sizes
        self._by_label = np.argsort(self._labels, kind="stable")
        self._starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self._place = np.empty(len(labels), dtype=np.int64)
        self._place[self._by_label] = np.arange(len(labels))

    def assemble(self, rows: Rows, random: np.random.Generator) -> Tensors:
        labels = self._labels[rows]
        starts, sizes = self._starts[labels], self._sizes[labels]
        # Any place among the label's texts but one's own; any place outside the label's.
        others = self._place[rows] - starts + random.integers(1, sizes)
        positives = self._by_label[starts + others % sizes]
        outside = random.integers(0, (len(self._labels) - sizes)[:, None], (len(rows), self._count))
        outside += np.where(outside >= starts[:, None], sizes[:, None], 0)
        documents = np.concatenate([positives[:, None], self._by_label[outside]], axis=1)
        grouped = np.concatenate([labels[:, None], self._labels[documents]], axis=1)
        every = np.concatenate([rows, documents.ravel()])
        return _texts(self._store, every) | {"labels": torch.from_numpy(grouped)}


class Mixed:
    """Two sources in turn, each as often as it has batches."""

    def __init__(self, first: Source, second: Source) -> None:
        """Mix them."""
        self._first, self._second = first, second
        self._share = first.per_epoch / self.per_epoch

    @property
    def per_epoch(self) -> int:
        return self._first.per_epoch + self._second.per_epoch

    def batch(self, number: int) -> Tensors:
        before, after = int(number * self._share), int((number + 1) * self._share)
        if after > before:
            return self._first.batch(before)
        return self._second.batch(number - before)


def _texts(store: TokenStore, rows: Rows, name: str = "") -> Tensors:
    ids, lengths = store.padded(rows)
    return {f"{name}ids": torch.from_numpy(ids), f"{name}lengths": torch.from_numpy(lengths)}
