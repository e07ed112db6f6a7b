"""What a line of training data says."""

from __future__ import annotations

from dataclasses import dataclass

from taskvec_train.errors import TrainingError


class DataError(TrainingError):
    """Data that cannot be used: says which file and line, what is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A query, a text that answers it, and texts that look like an answer and are none."""

    anchor: str
    positive: str
    negatives: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Scored:
    """Two texts and how alike they are: the higher, the more. The unit is the data's own."""

    a: str
    b: str
    score: float


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text and the name of its class."""

    text: str
    label: str
