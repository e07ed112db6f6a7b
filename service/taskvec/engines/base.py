"""The Engine protocol: token ids in, one vector a text out.

An engine never sees text, prompts, output dimensions or output types.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from taskvec.errors import UnavailableError
from taskvec.priority import Priority

TokenIds = NDArray[np.int32]


def _unheard() -> None:
    """For a batch whose way nobody follows."""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What is served, as far as an engine's callers need to know it.

    Attributes:
        name: the name clients ask for.
        revision: hub commit, or None for a folder.
        architecture: ``qwen3`` or ``eurobert``.
        dimension: width of the vectors.
        max_tokens: longest text the engine takes, in tokens, special tokens included.
        vocabulary: number of token ids; valid ids lie below it.
        matryoshka: dimensions the model was trained to be cut at; empty where unknown.
        adapters: adapter names; empty where the checkpoint has none.
        parameters: parameters of the backbone, embedding table included.
    """

    name: str
    revision: str | None
    architecture: str
    dimension: int
    max_tokens: int
    vocabulary: int
    matryoshka: tuple[int, ...]
    adapters: tuple[str, ...]
    parameters: int


@dataclass(frozen=True, slots=True, eq=False)
class TokenBatch:
    """The texts of one request, as token ids.

    Attributes:
        ids: one int32 array [length] a text, each 1..max_tokens long, ids below the vocabulary.
        adapter: the adapter to apply to all of them; None for the bare backbone.
        deadline: ``time.monotonic()`` after which nobody waits for the answer; None for never.
        priority: its class. A batch that takes more than one forward is bulk whatever this says.
        entered: called by the engine, from any thread, as the first text enters a forward; at once
            by an engine that cannot see its forwards.

    Cancelling the task that awaits ``Engine.embed`` withdraws every text that is not already in a
    forward.
    """

    ids: Sequence[TokenIds]
    adapter: str | None
    deadline: float | None = None
    priority: Priority = Priority.INTERACTIVE
    entered: Callable[[], None] = _unheard

    @property
    def tokens(self) -> int:
        """Total number of tokens."""
        return sum(map(len, self.ids))


@dataclass(frozen=True, slots=True, eq=False)
class EngineResult:
    """What came of a TokenBatch.

    Attributes:
        vectors: float32 [texts, dimension], in the order of the batch, **not** normalised.
        queued: seconds until the first text entered a forward.
        computed: seconds from then until the last vector was there.
    """

    vectors: NDArray[np.float32]
    queued: float
    computed: float


class EngineState(enum.Enum):
    """Where an engine is in its life; UNAVAILABLE ends by itself, DEAD only with the process."""

    STARTING = "starting"
    READY = "ready"
    UNAVAILABLE = "unavailable"
    STOPPING = "stopping"
    DEAD = "dead"


class Outcome(enum.StrEnum):
    """How a call to an engine server ended; a metric label.

    It is defined here, not beside the client, so that the metrics need not import aiohttp.
    """

    OK = "ok"
    BUSY = "busy"
    UNREACHABLE = "unreachable"
    ERROR = "error"
    TIMEOUT = "timeout"
    WRONG = "wrong"
    ABANDONED = "abandoned"


class DropReason(enum.StrEnum):
    """Why a text left the queue without being embedded; a metric label."""

    CANCELLED = "cancelled"
    EXPIRED = "expired"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """Whether the engine can answer, and if not, why."""

    state: EngineState
    reason: str = ""

    @property
    def ready(self) -> bool:
        """True when a request would be answered."""
        return self.state is EngineState.READY

    def require_ready(self) -> None:
        """Refuse work that would not be answered.

        Raises:
            UnavailableError: saying why, and when to come back.
        """
        if self.ready:
            return
        codes = {EngineState.STARTING: "starting", EngineState.STOPPING: "draining"}
        raise UnavailableError(
            f"The engine cannot embed now: {self.reason}.",
            code=codes.get(self.state),
            retry_after=1,
        )


class QueueObserver(Protocol):
    """What every engine reports while it works."""

    def queue_changed(self, texts: int, tokens: int, oldest: float | None) -> None:
        """The queue now holds this much, and since ``time.monotonic()`` ``oldest``.

        Where an engine cannot see forwards, what is in one is still in the queue.
        """


class EngineObserver(QueueObserver, Protocol):
    """What an engine in this process reports; called from the engine's own thread."""

    def batch_started(self, waited: Sequence[float]) -> None:
        """Requests entered their first forward after these many seconds in the queue."""

    def batch_finished(self, texts: int, tokens: int, seconds: float, budget: int) -> None:
        """One forward over this much, of at most ``budget`` tokens, took so long."""

    def memory_ran_out(self, budget: int) -> None:
        """A forward did not fit into memory; the next ones hold at most ``budget`` tokens."""

    def texts_dropped(self, reason: DropReason, texts: int) -> None:
        """Texts left the queue without being embedded."""


class Engine(Protocol):
    """Something that embeds token ids; see docs/architecture.md."""

    @property
    def model(self) -> ModelCard:
        """The card of the served model; known before ``start``."""

    @property
    def finished(self) -> int:
        """Grows with all that is embedded; work that waits while this stands still is stalled."""

    async def start(self) -> None:
        """Load the weights, prove every adapter, warm up.

        Raises:
            CheckpointError: the checkpoint cannot be served; the message says why.
        """

    async def embed(self, batch: TokenBatch) -> EngineResult:
        """Embed one request's texts, in whatever forwards the engine sees fit.

        Raises:
            UnavailableError: the engine is not ready, stopping or dead.
            DeadlineExceededError: the deadline passed before every text was embedded.
        """

    async def stop(self) -> None:
        """Finish what was admitted, then release everything."""

    def health(self) -> EngineHealth:
        """The present state; cheap enough to ask on every request."""
