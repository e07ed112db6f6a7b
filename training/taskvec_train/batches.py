"""Which rows go into which batch: a pure function of the seed and the batch's number."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from taskvec_train.data.records import DataError
from taskvec_train.tokens import MULTIPLE

Rows = NDArray[np.int64]
BATCHES_SORTED_TOGETHER = 64


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """Length-bucketed batches, in another order every epoch, shared out among processes.

    Rows are shuffled, sorted by length within chunks of about 64 batches, cut, and the batches
    shuffled: little padding, yet no batch is the same twice. Nothing is remembered from batch to
    batch, so a run can be continued from any number.

    Attributes:
        lengths: tokens of each row, [rows].
        tokens: most tokens of a batch, padding counted; 0 where ``items`` decides.
        items: rows of each batch; 0 where ``tokens`` decides.
        rank: which process this is, of ``processes``.
    """

    lengths: Rows
    seed: int
    tokens: int = 0
    items: int = 0
    rank: int = 0
    processes: int = 1

    def check(self, where: str) -> None:
        """Refuse data that gives not even one batch to every process.

        Raises:
            DataError: there are too few rows, or a row is longer than a whole batch.
        """
        rows = len(self.lengths)
        if rows < max(self.items * self.processes, 1):
            raise DataError(
                f"{where}: {rows} records are fewer than a batch of {self.items} for each of "
                f"{self.processes} processes: give more data, or lower `batch`."
            )
        if self.tokens and (longest := int(self.lengths.max())) + MULTIPLE > self.tokens:
            raise DataError(
                f"{where}: a text of {longest} tokens does not fit a batch of {self.tokens}: raise "
                "`tokens`, or lower `max_tokens`."
            )
        if len(self.epoch(0)) == 0:
            raise DataError(
                f"{where}: {rows} records make fewer batches of {self.tokens} tokens than there "
                f"are processes, {self.processes}: give more data, or lower `tokens`."
            )

    def epoch(self, number: int) -> list[Rows]:
        """This process's batches of one epoch."""
        random = np.random.default_rng([self.seed, number])
        order = random.permutation(len(self.lengths))
        if self.items:
            size = self.items * BATCHES_SORTED_TOGETHER
        else:
            mean = max(float(self.lengths.mean()), 1.0)
            size = max(int(self.tokens / mean) * BATCHES_SORTED_TOGETHER, 1)
        batches: list[Rows] = []
        for start in range(0, len(order), size):
            chunk = order[start : start + size]
            chunk = chunk[np.argsort(self.lengths[chunk], kind="stable")]
            batches += self._cut(chunk)
        shuffled = [batches[i] for i in random.permutation(len(batches))]
        whole = len(shuffled) // self.processes * self.processes
        return shuffled[self.rank : whole : self.processes]

    def _cut(self, chunk: Rows) -> list[Rows]:
        """A chunk sorted by length, in batches; of a fixed size only whole ones."""
        if self.items:
            whole = len(chunk) // self.items * self.items
            return list(chunk[:whole].reshape(-1, self.items))
        return cut_by_tokens(chunk, self.lengths, self.tokens)


def cut_by_tokens(rows: Rows, lengths: Rows, tokens: int) -> list[Rows]:
    """Rows in batches of at most ``tokens`` tokens with padding, or of one row.

    Args:
        rows: sorted by length.
        lengths: of all rows.
        tokens: the budget.
    """
    padded = -(-lengths[rows] // MULTIPLE) * MULTIPLE
    batches, start = [], 0
    while start < len(rows):
        # The batch that starts here may take n rows while n times its longest row fits.
        ahead = padded[start : start + tokens]
        most = int(np.count_nonzero(ahead * np.arange(1, len(ahead) + 1) <= tokens))
        batches.append(rows[start : start + max(most, 1)])
        start += max(most, 1)
    return batches
