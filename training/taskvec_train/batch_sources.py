"""Batches of tensors from tokenised records, each a function of its number alone."""

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

FloatArray = NDArray[np.float32]
Tensors = dict[str, Tensor]


class VectorLookup(Protocol):
    """Lookup of the teacher's vectors by row."""

    def __call__(self, rows: Rows) -> FloatArray:
        """Return float32 [rows, dimension]."""
        ...


class BatchSource(Protocol):
    """Batches of one stage."""

    def batch(self, number: int) -> Tensors:
        """Return one batch of this process; the same number gives the same batch."""
        ...

    @property
    def per_epoch(self) -> int:
        """Approximate number of batches in which every record occurs once."""
        ...


class PlannedSource:
    """A source that follows a ``BatchPlan``; subclasses turn rows into tensors."""

    def __init__(self, plan: BatchPlan, where: str) -> None:
        """Plan the first epoch.

        Args:
            plan: assigns rows to batches.
            where: name of the data in error messages.

        Raises:
            DataError: the data does not make a single batch.
        """
        plan.check(where)
        self._plan = plan
        self._epoch, self._batches = 0, plan.epoch(0)
        self._ends = [len(self._batches)]

    @property
    def per_epoch(self) -> int:
        return self._ends[0]

    def batch(self, number: int) -> Tensors:
        """See ``BatchSource.batch``; each epoch has its own batches."""
        while number >= self._ends[-1]:
            self._start_epoch(len(self._ends))
            self._ends.append(self._ends[-1] + len(self._batches))
        epoch = int(np.searchsorted(self._ends, number, side="right"))
        if epoch != self._epoch:
            self._start_epoch(epoch)
        rows = self._batches[number - (self._ends[epoch - 1] if epoch else 0)]
        return self.assemble(
            rows, np.random.default_rng([self._plan.seed, self._plan.rank, number])
        )

    def _start_epoch(self, epoch: int) -> None:
        self._epoch, self._batches = epoch, self._plan.epoch(epoch)

    def assemble(self, rows: Rows, random: np.random.Generator) -> Tensors:
        """Return the tensors of these rows; ``random`` is the only source of randomness."""
        raise NotImplementedError


class TextSource(PlannedSource):
    """Texts and the teacher's vectors as targets."""

    def __init__(
        self, plan: BatchPlan, where: str, store: TokenStore, chosen: Rows, teacher: VectorLookup
    ) -> None:
        """Combine tokenised texts and targets; ``plan`` is over the chosen rows of the store."""
        super().__init__(plan, where)
        self._store, self._chosen, self._teacher = store, chosen, teacher

    def assemble(self, rows: Rows, random: np.random.Generator) -> Tensors:
        del random
        rows = self._chosen[rows]
        return _text_tensors(self._store, rows) | {"teacher": torch.from_numpy(self._teacher(rows))}


class PairSource(PlannedSource):
    """Anchors, their positives, and hard negatives that the whole batch shares."""

    def __init__(
        self,
        plan: BatchPlan,
        where: str,
        store: TokenStore,
        pairs: Rows,
        *,
        negatives: Rows,
        teacher: VectorLookup,
        hard: int,
        margin: float,
    ) -> None:
        """Combine pairs, negatives and the teacher.

        Args:
            plan: over the pairs.
            where: name of the data in error messages.
            store: all texts, each with its prompt.
            pairs: int64 [pairs, 2]: rows of anchor and positive in the store.
            negatives: int64 [pairs, n]: rows of negatives, padded with -1.
            teacher: lookup by row of the store.
            hard: number of negatives drawn for each anchor.
            margin: candidates with a teacher cosine to the anchor above this share of the
                positive's are false negatives and ignored.
        """
        super().__init__(plan, where)
        self._store, self._teacher = store, teacher
        self._pairs, self._negatives = pairs, negatives
        self._hard = min(hard, negatives.shape[1])
        self._margin = margin

    def assemble(self, rows: Rows, random: np.random.Generator) -> Tensors:
        anchors, positives = self._pairs[rows].T
        drawn = self._draw_negatives(rows, random)
        candidates = np.concatenate([positives, drawn[drawn >= 0]])
        x, y = self._teacher(anchors), self._teacher(candidates)
        ignored = self._false_negatives(anchors, candidates, x, y)
        return (
            _text_tensors(self._store, anchors, "anchor_")
            | _text_tensors(self._store, candidates, "candidate_")
            | {
                "ignored": torch.from_numpy(ignored),
                "anchor_teacher": torch.from_numpy(x),
                "positive_teacher": torch.from_numpy(y[: len(rows)]),
            }
        )

    def _draw_negatives(self, rows: Rows, random: np.random.Generator) -> Rows:
        """Return int64 [rows, hard], drawn negatives; -1 if a pair has fewer."""
        given = self._negatives[rows]
        keys = random.random(given.shape)
        keys[given < 0] = 2  # padding sorts last
        order = np.argsort(keys, axis=1)[:, : self._hard]
        drawn: Rows = np.take_along_axis(given, order, axis=1)
        return drawn

    def _false_negatives(
        self, anchors: Rows, candidates: Rows, x: FloatArray, y: FloatArray
    ) -> NDArray[np.bool_]:
        count = len(anchors)
        scores = x @ y.T
        ignored = scores > self._margin * scores.diagonal()[:, None]
        ignored |= candidates == candidates[:count, None]  # another anchor's, the same text
        ignored[:, :count] |= anchors == anchors[:, None]  # the same anchor, another positive
        np.fill_diagonal(ignored, val=False)
        return ignored


class ScoredSource(PlannedSource):
    """Pairs of texts with similarity scores."""

    def __init__(
        self, plan: BatchPlan, where: str, store: TokenStore, pairs: Rows, scores: FloatArray
    ) -> None:
        """Combine pairs, int64 [records, 2] rows of the store, and scores, float32 [records]."""
        super().__init__(plan, where)
        self._store, self._pairs, self._scores = store, pairs, scores

    def assemble(self, rows: Rows, random: np.random.Generator) -> Tensors:
        del random
        a, b = self._pairs[rows].T
        scores = torch.from_numpy(self._scores[rows])
        return (
            _text_tensors(self._store, a, "a_")
            | _text_tensors(self._store, b, "b_")
            | {"scores": scores}
        )


class GroupSource(PlannedSource):
    """Groups of a labelled text, another text of its label, and some texts of other labels."""

    def __init__(
        self,
        plan: BatchPlan,
        where: str,
        store: TokenStore,
        labels: Sequence[str],
        negatives: int,
    ) -> None:
        """Combine texts and labels.

        Args:
            plan: over the texts.
            where: name of the data in error messages.
            store: the texts, in the order of ``labels``.
            labels: label of each text.
            negatives: number of texts of other labels in a group.

        Raises:
            DataError: a label has only one text, or all texts have the same label.
        """
        super().__init__(plan, where)
        self._store, self._count = store, negatives
        names, self._labels, sizes = np.unique(labels, return_inverse=True, return_counts=True)
        if len(names) < 2:
            raise DataError(
                f"{where}: all texts have the label {str(names[0])!r}: at least two are needed."
            )
        if sizes.min() < 2:
            raise DataError(
                f"{where}: the label {str(names[sizes.argmin()])!r} has only one text, and "
                "positives need a second one: add a text, or remove the label."
            )
        self._sizes = sizes
        self._by_label = np.argsort(self._labels, kind="stable")
        self._starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self._position = np.empty(len(labels), dtype=np.int64)
        self._position[self._by_label] = np.arange(len(labels))

    def assemble(self, rows: Rows, random: np.random.Generator) -> Tensors:
        labels = self._labels[rows]
        starts, sizes = self._starts[labels], self._sizes[labels]
        # Positives: a random offset from the text's own position within its label, never 0.
        # Negatives: a random position among all texts, skipping the label's range.
        offsets = self._position[rows] - starts + random.integers(1, sizes)
        positives = self._by_label[starts + offsets % sizes]
        negatives = random.integers(
            0, (len(self._labels) - sizes)[:, None], (len(rows), self._count)
        )
        negatives += np.where(negatives >= starts[:, None], sizes[:, None], 0)
        documents = np.concatenate([positives[:, None], self._by_label[negatives]], axis=1)
        grouped = np.concatenate([labels[:, None], self._labels[documents]], axis=1)
        every = np.concatenate([rows, documents.ravel()])
        return _text_tensors(self._store, every) | {"labels": torch.from_numpy(grouped)}


class InterleavedSource:
    """Two sources, interleaved in proportion to their numbers of batches."""

    def __init__(self, first: BatchSource, second: BatchSource) -> None:
        """Interleave two sources."""
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


def _text_tensors(store: TokenStore, rows: Rows, name: str = "") -> Tensors:
    ids, lengths = store.padded(rows)
    return {f"{name}ids": torch.from_numpy(ids), f"{name}lengths": torch.from_numpy(lengths)}
