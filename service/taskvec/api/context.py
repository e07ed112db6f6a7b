"""What is known of a request while it passes through."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from starlette.types import Scope

from taskvec.auth.keys import Key
from taskvec.core.embedder import Charge
from taskvec.telemetry.stages import Stages

CONTEXT_KEY = "taskvec.record"
"""Where the middleware keeps the record in the ASGI scope."""


@dataclass(slots=True)
class RequestContext:
    """Filled in by whoever learns it; times in seconds.

    Attributes:
        status: of the answer; 0 while there is none.
        stages: where the time went.
        output: number type and transport of the vectors; None while unknown.
        code: of the error that the answer is; None for a good one.
        trace_id: 32 hexadecimal digits; None where the request is not traced.
        key: whose request it is; None where no key is asked for, or none was given.
        charge: what the key's token limit is charged by; None where it has none.
        headers: further ones of the answer, whatever it will be.
    """

    request_id: str
    started: float = field(default_factory=time.perf_counter)
    status: int = 0
    task: str | None = None
    texts: int = 0
    tokens: int = 0
    stages: Stages = field(default_factory=Stages)
    output: tuple[str, str] | None = None
    code: str | None = None
    trace_id: str | None = None
    key: Key | None = None
    charge: Charge | None = None
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)


def context_of(scope: Scope) -> RequestContext:
    """The record of the request with this scope."""
    record: RequestContext = scope[CONTEXT_KEY]
    return record
