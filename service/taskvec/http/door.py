"""Refusals that cost no work: what the service would refuse anyway, told before a body is read."""

from __future__ import annotations

from starlette.types import Scope

from taskvec.core.admission import Admission
from taskvec.core.health import ServiceHealth
from taskvec.engines.wire import WIRE_PATH
from taskvec.errors import InvalidRequestError, QueueFullError, TaskvecError
from taskvec.http.access import Gate
from taskvec.http.headers import headers_of
from taskvec.http.limits import priority_asked
from taskvec.http.record import RequestRecord
from taskvec.telemetry.pulse import Pulse

EMBEDDING_PATHS = frozenset({"/v1/embeddings", WIRE_PATH})

MOST_LATE = 0.1
"""Seconds by which the present turn of the event loop may be late: what it then still has to begin,
it refuses. So a turn ends soon, however much comes, and what was begun before goes on."""


class Door:
    """Stands before every route; shut while there is no room or no time, or the service leaves."""

    def __init__(
        self, health: ServiceHealth, admission: Admission, pulse: Pulse, gate: Gate | None
    ) -> None:
        """Of a service; the gate is None where nobody is asked for a key."""
        self._health = health
        self._admission = admission
        self._pulse = pulse
        self._gate = gate

    def refusal(self, scope: Scope, record: RequestRecord) -> TaskvecError | None:
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
            self._admission.require_room(priority_asked(headers_of(scope), key))
        except InvalidRequestError:
            return None
        except TaskvecError as refusal:
            record.key = key
            return refusal
        return None
