"""What a caller wants, whatever dialect it spoke."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from taskvec.core.tasks import Task
from taskvec.engines.base import TokenIds
from taskvec.errors import InvalidRequestError
from taskvec.priority import Priority


class OutputType(enum.Enum):
    """Number type of the answer's vectors."""

    FLOAT = "float"
    FLOAT16 = "float16"
    INT8 = "int8"
    UINT8 = "uint8"
    BINARY = "binary"
    UBINARY = "ubinary"

    @property
    def packed(self) -> bool:
        """True where eight dimensions share a byte."""
        return self in (OutputType.BINARY, OutputType.UBINARY)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class EmbedJob:
    """Texts (or token ids) to embed, and how the vectors should look.

    Attributes:
        inputs: non-empty strings, or int32 token-id arrays that are embedded as they are.
        dimensions: first so many values are kept; None for all.
        normalized: True scales vectors to length 1 before they are quantised.
        truncate: True cuts what is too long, False refuses it.
        deadline: ``time.monotonic()`` after which nobody waits; None for never.
        priority: which share of the engine it draws on.
        owner: whose it is: the name of an API key; None where there is none. Cached answers belong
            to one owner.
    """

    inputs: Sequence[str] | Sequence[TokenIds]
    task: Task
    dimensions: int | None = None
    output: OutputType = OutputType.FLOAT
    normalized: bool = True
    truncate: bool = False
    deadline: float | None = None
    priority: Priority = Priority.INTERACTIVE
    owner: str | None = None

    def check_dimensions(self, dimension: int) -> None:
        """Refuse dimensions that a model of this width, or the output type, cannot give.

        Raises:
            InvalidRequestError: naming the bounds.
        """
        wanted = dimension if self.dimensions is None else self.dimensions
        if not 1 <= wanted <= dimension:
            raise InvalidRequestError(
                f"dimensions must lie between 1 and {dimension}, got {self.dimensions}.",
                code="invalid_dimensions",
                param="dimensions",
            )
        if self.output.packed and wanted % 8:
            raise InvalidRequestError(
                f"{self.output.value} vectors pack 8 dimensions into a byte: dimensions must be a "
                f"multiple of 8, got {wanted}.",
                code="invalid_dimensions",
                param="dimensions",
            )


@dataclass(frozen=True, slots=True, eq=False)
class Embeddings:
    """The answer to a job.

    Attributes:
        vectors: [texts, dimensions] float32, float16, int8 or uint8; binary types have an eighth
            of the columns.
        tokens: tokens embedded, prompt and special tokens included, what was cut off not.
    """

    vectors: NDArray[np.generic]
    tokens: int
