"""What a test asks of a client, and what the client makes of a refusal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MODEL = "taskvec-mini"
QUERY, PASSAGE = "retrieval.query", "retrieval.passage"


@dataclass(frozen=True)
class Call:
    """One call of a client.

    Attributes:
        url: the service, without a path.
        texts: what to embed.
        task: our name of a task; a client translates it, or appends it to the model's name.
        key: API key.
        model: served name.
        dimensions: to keep; None leaves the field out.
        type: output type; None leaves the field out.
        retries: after a refusal; None leaves the client its own default.
    """

    url: str
    texts: Sequence[str]
    task: str = PASSAGE
    key: str = "none"
    model: str = MODEL
    dimensions: int | None = None
    type: str | None = None
    retries: int | None = None

    @property
    def named(self) -> str:
        """The model's name with the task, for a client that has no field for it."""
        return f"{self.model}:{self.task}"


class RefusedError(Exception):
    """A client has raised an exception.

    Attributes:
        name: class of the exception.
        status: of the response, where the exception has it.
        message: text of the exception.
    """

    def __init__(self, name: str, status: int | None, message: str) -> None:
        super().__init__(f"{name} {status}: {message}")
        self.name = name
        self.status = status
        self.message = message
