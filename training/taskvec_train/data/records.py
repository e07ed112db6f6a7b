"""Types of training records."""

from __future__ import annotations

from dataclasses import dataclass

from taskvec_train.errors import TrainingError


class DataError(TrainingError):
    """Invalid data; the message says which file and line, what is wrong, and what to do."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A query (anchor), a text that answers it, and hard negatives."""

    anchor: str
    positive: str
    negatives: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Scored:
    """Two texts and their similarity: higher is more similar, in any unit."""

    a: str
    b: str
    score: float


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text and the name of its class."""

    text: str
    label: str
