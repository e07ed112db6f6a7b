"""Assign rows to batches: a pure function of the seed and the batch number."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from taskvec_train.data.records import DataError
from taskvec_train.tokens import PAD_MULTIPLE

Rows = NDArray[np.int64]
SORT_BATCHES = 64
"""Rows are sorted by length within chunks of about this number of batches."""


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """Batches of rows of similar length, in a different order each epoch, split among processes.

    Rows are shuffled, sorted by length within chunks of about ``SORT_BATCHES`` batches, split into
    batches, and the batches shuffled: padding is small, yet batches differ between epochs. There
    is no state between batches, so that a run can be resumed at any batch number.

    Attributes:
        lengths: int64 [rows], tokens of each row.
        seed: of the shuffling.
        tokens: maximum number of tokens of a batch, padding included; 0 if ``items`` is set.
        items: number of rows of each batch; 0 if ``tokens`` is set.
        rank: index of this process.
        processes: number of processes.
    """

    lengths: Rows
    seed: int
    tokens: int = 0
    items: int = 0
    rank: int = 0
    processes: int = 1

    def check(self, where: str) -> None:
        """Check that the data makes at least one batch for every process.

        Args:
            where: the name of the data in error messages.

        Raises:
            DataError: there are too few rows, or a row has more tokens than a batch may have.
        """
        rows = len(self.lengths)
        if rows < max(self.items * self.processes, 1):
            raise DataError(
                f"{where}: {rows} records are fewer than a batch of {self.items} for each of "
                f"{self.processes} processes: add data, or lower `batch`."
            )
        if self.tokens and (longest := int(self.lengths.max())) + PAD_MULTIPLE > self.tokens:
            raise DataError(
                f"{where}: a text of {longest} tokens does not fit into a batch of {self.tokens}: "
                "raise `tokens`, or lower `max_tokens`."
            )
        if len(self.epoch(0)) == 0:
            raise DataError(
                f"{where}: {rows} records make fewer batches of {self.tokens} tokens than there "
                f"are processes ({self.processes}): add data, or lower `tokens`."
            )

    def epoch(self, number: int) -> list[Rows]:
        """Return this process's batches of one epoch."""
        random = np.random.default_rng([self.seed, number])
        order = random.permutation(len(self.lengths))
        if self.items:
            size = self.items * SORT_BATCHES
        else:
            mean = max(float(self.lengths.mean()), 1.0)
            size = max(int(self.tokens / mean) * SORT_BATCHES, 1)
        batches: list[Rows] = []
        for start in range(0, len(order), size):
            chunk = order[start : start + size]
            chunk = chunk[np.argsort(self.lengths[chunk], kind="stable")]
            batches += self._split(chunk)
        shuffled = [batches[i] for i in random.permutation(len(batches))]
        whole = len(shuffled) // self.processes * self.processes
        return shuffled[self.rank : whole : self.processes]

    def _split(self, chunk: Rows) -> list[Rows]:
        """Split a sorted chunk into batches; with a fixed size, drop an incomplete one."""
        if self.items:
            whole = len(chunk) // self.items * self.items
            return list(chunk[:whole].reshape(-1, self.items))
        return split_by_tokens(chunk, self.lengths, self.tokens)


def split_by_tokens(rows: Rows, lengths: Rows, tokens: int) -> list[Rows]:
    """Split rows into batches of at most ``tokens`` tokens, padding included.

    A row with more tokens makes a batch of its own.

    Args:
        rows: int64 [n], sorted by length.
        lengths: int64, tokens of all rows.
        tokens: the token budget of a batch.
    """
    padded = -(-lengths[rows] // PAD_MULTIPLE) * PAD_MULTIPLE
    batches, start = [], 0
    while start < len(rows):
        # A batch of n rows fits if n times its longest (last) row is within the budget.
        ahead = padded[start : start + tokens]
        count = int(np.count_nonzero(ahead * np.arange(1, len(ahead) + 1) <= tokens))
        batches.append(rows[start : start + max(count, 1)])
        start += max(count, 1)
    return batches
