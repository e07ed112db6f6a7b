"""Batch small concurrent calls to one server: what arrives during a call shares the next call.

An HTTP call costs about as much CPU time as tokenising ten short texts, on both sides.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass, field

from taskvec.engines.base import CallOutcome, TokenIds
from taskvec.engines.remote.client import ServerCallError
from taskvec.engines.remote.protocols import Vectors
from taskvec.errors import TaskvecError

MAX_CALLS = 2
"""Maximum concurrent calls: one that the engine computes, and one that waits for it."""

MAX_TEXTS = 64
"""Number of texts from which on no further caller joins a call."""

TIMEOUT_MARGIN_SECONDS = 0.05
"""Seconds that a caller waits beyond its own timeout. A call that starts at once has the same
timeout: it must expire first, because only the call can detect a hung server."""

Send = Callable[[Sequence[TokenIds], Sequence[str | None], float], Awaitable[Vectors]]
"""Sends texts with their adapters in one call, with a timeout in seconds."""


@dataclass(eq=False, slots=True)
class _Pending:
    """The texts of one caller.

    Attributes:
        alone: its call is shared with no other caller.
    """

    texts: Sequence[TokenIds]
    adapter: str | None
    timeout_seconds: float
    future: asyncio.Future[Vectors]
    context: Context
    call: _Call | None = None
    alone: bool = False


@dataclass(eq=False, slots=True)
class _Call:
    """One call in progress, on behalf of one or more callers."""

    pending: list[_Pending]
    task: asyncio.Task[None] | None = field(default=None)

    @property
    def cancelled(self) -> bool:
        """True if all callers have been cancelled."""
        return all(pending.future.cancelled() for pending in self.pending)


class CallBatcher:
    """Sends the first calls at once, and batches those that arrive while calls are in progress."""

    def __init__(self, send: Send) -> None:
        """Create the batcher.

        Args:
            send: sends one call.
        """
        self._send = send
        self._waiting: deque[_Pending] = deque()
        self._calls: set[_Call] = set()

    async def submit(
        self, texts: Sequence[TokenIds], adapter: str | None, timeout_seconds: float
    ) -> Vectors:
        """Embed texts in a call that may be shared with other callers.

        A call is cancelled when all its callers are cancelled.

        Args:
            texts: int32 token ids [length] of each text.
            adapter: the adapter of all texts; None for the bare backbone.
            timeout_seconds: timeout, including the time before the call starts.

        Returns:
            float32 [texts, dimension].

        Raises:
            ServerCallError: the shared call failed, or the timeout expired.
            TaskvecError: one of these texts cannot be embedded.
        """
        future: asyncio.Future[Vectors] = asyncio.get_running_loop().create_future()
        pending = _Pending(texts, adapter, timeout_seconds, future, copy_context())
        self._waiting.append(pending)
        self._start_calls()
        try:
            async with asyncio.timeout(timeout_seconds + TIMEOUT_MARGIN_SECONDS):
                return await pending.future
        except TimeoutError:  # it waited for another call; its own call has time left
            raise ServerCallError(
                CallOutcome.TIMEOUT, f"no answer within {timeout_seconds:.3g} seconds"
            ) from None
        except asyncio.CancelledError:
            call = pending.call
            if call is not None and call.task is not None and call.cancelled:
                call.task.cancel()
            raise

    async def close(self) -> None:
        """Cancel the calls in progress; none has a caller. A call outlives a caller's timeout."""
        tasks = [call.task for call in self._calls if call.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start_calls(self) -> None:
        while self._waiting and len(self._calls) < MAX_CALLS:
            call = _Call(self._take_waiting())
            if not call.pending:
                return
            for pending in call.pending:
                pending.call = call
            self._calls.add(call)
            # In the context of the first caller, for its trace: the current context may belong to
            # a call that has just ended.
            call.task = asyncio.create_task(self._run(call), context=call.pending[0].context)

    def _take_waiting(self) -> list[_Pending]:
        taken: list[_Pending] = []
        texts = 0
        while self._waiting and texts < MAX_TEXTS:
            if taken and (taken[0].alone or self._waiting[0].alone):
                break
            pending = self._waiting.popleft()
            if not pending.future.done():
                taken.append(pending)
                texts += len(pending.texts)
        return taken

    async def _run(self, call: _Call) -> None:
        texts = [text for pending in call.pending for text in pending.texts]
        adapters = [pending.adapter for pending in call.pending for _ in pending.texts]
        try:
            vectors = await self._send(
                texts, adapters, max(pending.timeout_seconds for pending in call.pending)
            )
        except Exception as error:  # noqa: BLE001 - callers must get every error
            self._fail(call, error)
        else:
            start = 0
            for pending in call.pending:
                stop = start + len(pending.texts)
                if not pending.future.done():
                    pending.future.set_result(vectors[start:stop])
                start = stop
        finally:
            self._calls.discard(call)
            self._start_calls()

    def _fail(self, call: _Call, error: Exception) -> None:
        if isinstance(error, TaskvecError) and len(call.pending) > 1:
            # Only the caller whose text cannot be embedded is to fail: each gets a call of its own.
            for pending in call.pending:
                pending.alone = True
            self._waiting.extendleft(reversed(call.pending))
            return
        for pending in call.pending:
            if not pending.future.done():
                pending.future.set_exception(_copy(error))


def _copy(error: Exception) -> Exception:
    """Return a copy for one caller, because each task adds its own traceback."""
    if isinstance(error, ServerCallError):
        return ServerCallError(error.outcome, error.message, error.retry_after)
    return error
