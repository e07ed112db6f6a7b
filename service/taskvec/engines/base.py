"""The Engine protocol: token ids in, one vector per text out.

An engine does not know texts, prompts, output dimensions or output types.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from taskvec.checkpoint.backbone import ModelCard
from taskvec.errors import UnavailableError
from taskvec.priority import Priority

TokenIds = NDArray[np.int32]
"""Token ids of one text: int32 [length]."""


def do_nothing() -> None:
    """Do nothing: the default of callbacks."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenBatch:
    """The texts of one request, as token ids.

    Attributes:
        ids: int32 [length] of each text, 1 to max_tokens ids below the vocabulary size.
        adapter: the adapter of all texts; None for the bare backbone.
        deadline: ``time.monotonic()`` after which the result is not needed; None for no deadline.
        priority: class in which the engine schedules it; ``core.embedder`` decides.
        entered: called by the engine, from any thread, when the first text enters a forward pass;
            at once by an engine that cannot observe its forward passes.

    Cancelling the task that awaits ``Engine.embed`` withdraws every text that has not entered a
    forward pass.
    """

    ids: Sequence[TokenIds]
    adapter: str | None
    deadline: float | None = None
    priority: Priority = Priority.INTERACTIVE
    entered: Callable[[], None] = do_nothing

    @property
    def tokens(self) -> int:
        """Return the total number of tokens."""
        return sum(map(len, self.ids))


@dataclass(frozen=True, slots=True, eq=False)
class EngineResult:
    """Result of a TokenBatch.

    Attributes:
        vectors: float32 [texts, dimension], in the order of the batch, **not** normalised.
        queued: seconds until the first text entered a forward pass.
        computed: seconds from then until the last vector was computed.
        forward: seconds of its forward passes, without pauses; 0 if the engine cannot tell.
        processor: the same in processor time of the thread that computed, which other processes do
            not prolong; infinite if the engine cannot tell.
    """

    vectors: NDArray[np.float32]
    queued: float
    computed: float
    forward: float = 0.0
    processor: float = math.inf


class EngineState(enum.Enum):
    """Lifecycle state of an engine. UNAVAILABLE is temporary; DEAD lasts until the process ends."""

    STARTING = "starting"
    READY = "ready"
    UNAVAILABLE = "unavailable"
    STOPPING = "stopping"
    DEAD = "dead"


class CallOutcome(enum.StrEnum):
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
    TEXT_ERROR = "text_error"


class DropReason(enum.StrEnum):
    """Reason why a text left the queue without being embedded; a metric label."""

    CANCELLED = "cancelled"
    EXPIRED = "expired"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """State of an engine, and the reason if it is not ready.

    Attributes:
        state: what the engine does.
        reason: for operators.
        public_reason: for clients, without addresses; empty if they may have ``reason``.
    """

    state: EngineState
    reason: str = ""
    public_reason: str = ""

    @property
    def ready(self) -> bool:
        """True if the engine accepts requests."""
        return self.state is EngineState.READY

    @property
    def for_clients(self) -> str:
        """The reason, without what only operators may know."""
        return self.public_reason or self.reason

    def require_ready(self, *, for_operator: bool = False) -> None:
        """Check that the engine accepts requests.

        Args:
            for_operator: give the whole reason, not the one for clients.

        Raises:
            UnavailableError: it does not; the message has the reason.
        """
        if self.ready:
            return
        codes = {EngineState.STARTING: "starting", EngineState.STOPPING: "draining"}
        raise UnavailableError(
            f"The engine cannot embed now: {self.reason if for_operator else self.for_clients}.",
            code=codes.get(self.state),
            retry_after=1,
        )


class QueueObserver(Protocol):
    """Observer of the queue of an engine."""

    def queue_changed(self, texts: int, tokens: int, oldest: float | None) -> None:
        """The queue has changed.

        For an engine that does not see its forward passes, texts in a forward pass count as queued.

        Args:
            texts: number of queued texts.
            tokens: number of queued tokens.
            oldest: ``time.monotonic()`` when the oldest request was queued; None if empty.
        """


class EngineObserver(QueueObserver, Protocol):
    """Observer of an engine in this process; notified from the engine's thread."""

    def batch_started(self, waited: Sequence[float]) -> None:
        """Requests entered their first forward pass after ``waited`` seconds in the queue each."""

    def batch_finished(self, texts: int, tokens: int, seconds: float, budget: int) -> None:
        """A forward pass with these texts and tokens ended; its budget was ``budget`` tokens."""

    def forward_paused(self, seconds: float) -> None:
        """A bulk forward pass was paused for ``seconds`` while an interactive one was computed."""

    def memory_ran_out(self, budget: int) -> None:
        """A forward pass ran out of memory; the next ones have at most ``budget`` tokens."""

    def texts_dropped(self, reason: DropReason, texts: int) -> None:
        """Texts left the queue without being embedded."""


class Engine(Protocol):
    """Computes vectors from token ids; see docs/architecture.md."""

    @property
    def model(self) -> ModelCard:
        """Return the card of the served model; available before ``start``."""

    @property
    def finished(self) -> int:
        """Return a counter of completed work: if it stops while work is queued, work is stalled."""

    @property
    def batch_tokens(self) -> int:
        """Return the tokens of one full forward pass; a larger request is bulk work.

        It may be 0 before ``start`` has finished, and change while the engine runs.
        """

    async def start(self) -> None:
        """Load the weights, and check that every adapter is applied.

        Raises:
            CheckpointError: the checkpoint cannot be served; the message has the reason.
        """

    async def embed(self, batch: TokenBatch) -> EngineResult:
        """Embed the texts of one request, in one or more forward passes.

        Raises:
            UnavailableError: the engine is not ready.
            DeadlineExceededError: the deadline passed before every text was embedded.
        """

    async def stop(self) -> None:
        """Finish the admitted requests, then release all resources."""

    def health(self) -> EngineHealth:
        """Return the current state; cheap enough for every request."""
