"""Small calls that travel together: what arrives while others are under way shares the next call.

An HTTP call costs about as much as tokenising ten short texts, on both sides.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass, field

from taskvec.engines.base import TokenIds
from taskvec.engines.remote.client import Outcome, ServerFault
from taskvec.engines.remote.protocols import Vectors

TRIPS = 2
"""Calls under way at a time: one that the engine works on, one that waits for it."""

TEXTS_A_TRIP = 64
GRACE = 0.05
"""Seconds by which a call's own limit comes before that of a caller with the same: only the call
can tell a hung server."""

Send = Callable[[Sequence[TokenIds], Sequence[str | None], float], Awaitable[Vectors]]


@dataclass(eq=False, slots=True)
class _Pending:
    """The texts of one caller."""

    texts: Sequence[TokenIds]
    adapter: str | None
    seconds: float
    future: asyncio.Future[Vectors]
    context: Context
    trip: _Call | None = None


@dataclass(eq=False, slots=True)
class _Call:
    """One call under way."""

    parcels: list[_Pending]
    task: asyncio.Task[None] | None = field(default=None)

    @property
    def unwanted(self) -> bool:
        """True once nobody waits for any of it."""
        return all(parcel.future.cancelled() for parcel in self.parcels)


class CallBatcher:
    """Sends parcels at once while few calls are under way, and together otherwise."""

    def __init__(self, send: Send) -> None:
        """Nothing is under way yet.

        Args:
            send: one call: texts, their adapters, seconds it may take.
        """
        self._send = send
        self._waiting: deque[_Pending] = deque()
        self._trips: set[_Call] = set()

    async def deliver(
        self, texts: Sequence[TokenIds], adapter: str | None, seconds: float
    ) -> Vectors:
        """The vectors of some texts, float32 [texts, dimension].

        Cancelling withdraws them; a call that nobody waits for any more is closed.

        Raises:
            ServerFault: the call that they travelled in failed.
        """
        future: asyncio.Future[Vectors] = asyncio.get_running_loop().create_future()
        parcel = _Pending(texts, adapter, seconds, future, copy_context())
        self._waiting.append(parcel)
        self._start_trips()
        try:
            async with asyncio.timeout(seconds + GRACE):
                return await parcel.future
        except TimeoutError:  # it had waited; the call's own limit comes a little later
            raise ServerFault(Outcome.TIMEOUT, f"no answer within {seconds:.3g} seconds") from None
        except asyncio.CancelledError:
            trip = parcel.trip
            if trip is not None and trip.task is not None and trip.unwanted:
                trip.task.cancel()
            raise

    def _start_trips(self) -> None:
        while self._waiting and len(self._trips) < TRIPS:
            trip = _Call(self._load())
            if not trip.parcels:
                return
            for parcel in trip.parcels:
                parcel.trip = trip
            self._trips.add(trip)
            # In the first sender's context: not in that of the call which made room for this one.
            trip.task = asyncio.create_task(self._travel(trip), context=trip.parcels[0].context)

    def _load(self) -> list[_Pending]:
        parcels: list[_Pending] = []
        texts = 0
        while self._waiting and texts < TEXTS_A_TRIP:
            parcel = self._waiting.popleft()
            if not parcel.future.done():
                parcels.append(parcel)
                texts += len(parcel.texts)
        return parcels

    async def _travel(self, trip: _Call) -> None:
        texts = [text for parcel in trip.parcels for text in parcel.texts]
        adapters = [parcel.adapter for parcel in trip.parcels for _ in parcel.texts]
        try:
            vectors = await self._send(texts, adapters, max(p.seconds for p in trip.parcels))
        except Exception as error:  # noqa: BLE001 - whatever it was, nobody may wait for ever
            for parcel in trip.parcels:
                if not parcel.future.done():
                    parcel.future.set_exception(_copy(error))
        else:
            start = 0
            for parcel in trip.parcels:
                stop = start + len(parcel.texts)
                if not parcel.future.done():
                    parcel.future.set_result(vectors[start:stop])
                start = stop
        finally:
            self._trips.discard(trip)
            self._start_trips()


def _copy(error: Exception) -> Exception:
    """One for each who is told: a traceback belongs to one task."""
    if isinstance(error, ServerFault):
        return ServerFault(error.outcome, error.message, error.retry_after)
    return error
