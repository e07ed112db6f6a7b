"""Refusals that cost no work: what the service would refuse anyway, told before a body is read."""

from __future__ import annotations

import asyncio
import math
import time

from starlette.types import Scope

from taskvec.api.auth import Gate
from taskvec.api.context import RequestContext
from taskvec.api.request import header_dict, request_priority
from taskvec.core.admission import Admission
from taskvec.core.health import ServiceHealth
from taskvec.engines.wire import WIRE_PATH
from taskvec.errors import InvalidRequestError, QueueFullError, TaskvecError
from taskvec.metrics.registry import Metrics

EMBEDDING_PATHS = frozenset({"/v1/embeddings", WIRE_PATH})

MOST_LATE = 0.1
"""Seconds by which the present turn of the event loop may be late: what it then still has to begin,
it refuses. So a turn ends soon, however much comes, and what was begun before goes on."""


class LoadShedder:
    """Stands before every route; shut while there is no room or no time, or the service leaves."""

    def __init__(
        self, health: ServiceHealth, admission: Admission, pulse: EventLoopLag, gate: Gate | None
    ) -> None:
        """Of a service; the gate is None where nobody is asked for a key."""
        self._health = health
        self._admission = admission
        self._pulse = pulse
        self._gate = gate

    def refusal(self, scope: Scope, record: RequestContext) -> TaskvecError | None:
        """Why an embedding request is refused at once; None where a route has to look at it."""
        late = self._pulse.late
        if (
            (self._admission.open and late <= MOST_LATE)
            or scope["path"] not in EMBEDDING_PATHS
            or scope["method"] != "POST"
        ):
            return None
        key = None
        if self._gate is not None:
            key = self._gate.key_of(scope)
            if key is None:
                return None  # the gate says what is wrong with it
        try:
            self._health.require_open()
            if late > MOST_LATE:
                raise QueueFullError(
                    f"More requests come than this process can read, which is {late:.1f} seconds "
                    "behind: send it again later.",
                    retry_after=1.0,
                )
            self._admission.require_room(request_priority(header_dict(scope), key))
        except InvalidRequestError:
            return None
        except TaskvecError as refusal:
            record.key = key
            return refusal
        return None


EVERY = 0.05
"""Seconds between two beats."""

BEATS = 5
"""Of so many, the latest is reported."""


class EventLoopLag:
    """Beats first thing in every turn of the event loop that lasts, and in time where none does.

    A timer's callback and not a task: a task would come behind those that the same turn begins.
    """

    def __init__(self, metrics: Metrics) -> None:
        """Nothing beats yet; the metrics learn how late the beats are."""
        self._metrics = metrics
        self._due = math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._late: list[float] = []

    @property
    def late(self) -> float:
        """Seconds for which the present turn has kept the next beat waiting; 0 if it is not due."""
        return max(0.0, time.monotonic() - self._due)

    def start(self) -> None:
        """Beat in the running loop from now on, and renew the ages that change by themselves."""
        self._due = time.monotonic() + EVERY
        self._timer = asyncio.get_running_loop().call_later(EVERY, self._beat)

    def stop(self) -> None:
        """Beat no more."""
        if self._timer is not None:
            self._timer.cancel()
        self._due = math.inf

    def _beat(self) -> None:
        self._late.append(self.late)
        if len(self._late) == BEATS:
            self._metrics.loop_late(max(self._late))
            self._metrics.update_queue_age()
            self._late.clear()
        self.start()
