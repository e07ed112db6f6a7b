"""Load shedding: refuse embedding requests under overload, before their bodies are read.

This is the early check; the limits on tokens and requests are in ``core.admission``.
"""

from __future__ import annotations

from collections.abc import Mapping

from starlette.types import Scope

from taskvec.api.request import header_dict, request_priority
from taskvec.auth.keys import Key
from taskvec.core.admission import Admission
from taskvec.core.health import ServiceHealth
from taskvec.core.memory_pressure import LARGE_BODY_BYTES, MemoryPressure
from taskvec.errors import InvalidRequestError, QueueFullError
from taskvec.priority import Priority
from taskvec.telemetry.event_loop_lag import EventLoopLag

MAX_STANDING_DELAY = 1.0
"""Seconds of standing delay above which requests are refused. A burst makes an iteration late, and
is answered; while more requests arrive than can be read, iteration after iteration is late.
Requests that a late iteration has not read yet are then refused cheaply, so it ends soon and
admitted requests continue."""


class LoadShedder:
    """Refuses embedding requests when queue or memory is full, or the event loop stays late."""

    def __init__(
        self,
        health: ServiceHealth,
        admission: Admission,
        lag: EventLoopLag,
        pressure: MemoryPressure,
    ) -> None:
        """Take the sources of overload signals."""
        self._health = health
        self._admission = admission
        self._lag = lag
        self._pressure = pressure

    def check(self, scope: Scope, key: Key | None) -> None:
        """Pass a request, or refuse it at once.

        Args:
            scope: ASGI scope of the request.
            key: its API key; decides the priority class of a request that names none.

        Raises:
            QueueFullError: the queue of its class is full, memory is short, or the event loop
                stays late.
            UnavailableError: under overload, the service is draining or the engine cannot embed;
                otherwise ``ServiceHealth.work`` refuses these.
        """
        delay = self._lag.standing_delay
        pressure = self._pressure.level
        if self._admission.accepting and delay <= MAX_STANDING_DELAY and not pressure:
            return
        self._health.require_open()
        if delay > MAX_STANDING_DELAY:
            raise QueueFullError(
                f"This process has not kept up with its requests for {delay:.1f} seconds: send the "
                "request again later.",
                retry_after=1.0,
            )
        headers = header_dict(scope)
        try:
            priority = request_priority(headers, key)
        except InvalidRequestError:
            return  # the handler reports the invalid header
        self._pressure.require_embedding(bulk=priority is Priority.BULK or _is_large(headers))
        self._admission.require_room(priority)


def _is_large(headers: Mapping[str, str]) -> bool:
    """Return whether a body may have more than ``LARGE_BODY_BYTES``."""
    length = headers.get("content-length", "")
    return (
        not length.isdecimal()
        or len(length) > len(str(LARGE_BODY_BYTES))
        or (int(length) > LARGE_BODY_BYTES)
    )
