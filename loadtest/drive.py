"""Locust sends the requests, and what came back is noted one by one.

Its own statistics round response times to two digits; these do not. It takes 240 to 310 us of
processor time a request where sender.py takes 67, which sends one body over and over (by hand,
single texts on a busy machine): what that comes to is in each result as ``generator_cores``.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from gevent.event import Event
from locust import FastHttpUser, task
from locust.env import Environment
from locust.exception import StopUser

from arrivals import ClosedLoop, OpenLoop
from scenarios import Request, is_right

PATIENCE = 120.0
"""Seconds after which a request counts as one without an answer."""


@dataclass(slots=True)
class Seen:
    """What became of requests.

    Attributes:
        outcomes: by status; "0" without an answer, "wrong" for a 200 without all its vectors.
        milliseconds: of good answers, from the moment they were due, by kind.
        late: milliseconds from then until they were sent, of all.
        texts: of good answers.
        seconds: from the begin to the last answer.
        generator_cores: processor time of this process in each second.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    milliseconds: dict[str, list[float]] = field(default_factory=dict)
    late: list[float] = field(default_factory=list)
    texts: int = 0
    seconds: float = 0.0
    generator_cores: float = 0.0

    @property
    def answered(self) -> int:
        """Number of good answers."""
        return self.outcomes["200"]


class Traffic(FastHttpUser):
    """One user that sends for all: see arrivals.py for why."""

    concurrency = 1 << 16
    connection_timeout = PATIENCE
    network_timeout = PATIENCE

    @task
    def drive(self) -> None:
        """Follow the plan once."""
        options = self.environment.parsed_options
        try:
            options.plan.drive(self.send)
        finally:
            options.done.set()
        raise StopUser

    def send(self, request: Request, due: float) -> None:
        """Send one request; locust's listeners learn its latency from the moment it was due."""
        sent = time.perf_counter()
        headers = {
            "content-type": "application/json",
            "accept-encoding": "identity",
            **request.headers,
        }
        context = {"request": request, "late": 1000 * (sent - due)}
        with self.client.post(
            "/v1/embeddings",
            data=request.body,
            headers=headers,
            name=request.kind,
            context=context,
            catch_response=True,
        ) as answer:
            answer.request_meta["response_time"] = 1000 * (time.perf_counter() - due)
            if answer.status_code == 200:
                kind = answer.headers.get("content-type", "")
                if not is_right(request, kind, answer.content):
                    answer.failure("wrong")


def drive(url: str, plan: OpenLoop | ClosedLoop) -> Seen:
    """Send what the plan says to a server; returns when all is answered."""
    seen = Seen()
    options = argparse.Namespace(plan=plan, done=Event())
    environment = Environment(user_classes=[Traffic], host=url, parsed_options=options)

    def note(
        response_time: float, response: Any, exception: Any, context: dict[str, Any], **_: Any
    ) -> None:
        request: Request = context["request"]
        seen.late.append(context["late"])
        status = response.status_code
        outcome = "wrong" if status == 200 and exception else str(status)
        seen.outcomes[outcome] += 1
        if outcome == "200":
            seen.milliseconds.setdefault(request.kind, []).append(response_time)
            seen.texts += request.texts

    environment.events.request.add_listener(note)
    runner = environment.create_local_runner()
    begun, worked = time.perf_counter(), time.process_time()
    runner.start(1, spawn_rate=1)
    options.done.wait()
    seen.seconds = time.perf_counter() - begun
    seen.generator_cores = (time.process_time() - worked) / seen.seconds
    runner.quit()
    return seen
