"""Send requests with locust and record every response.

Locust's own statistics round response times to two digits; these do not. Locust takes 240 to 310 us
of CPU time per request, where sender.py, which always sends the same body, takes 67 (measured by
hand, single texts on a busy machine). Each result has the total as ``generator_cores``.
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
from scenarios import Request, is_complete

TIMEOUT_SECONDS = 120.0
"""Timeout of a request, which then counts as one without a response."""


@dataclass(slots=True)
class RunResult:
    """Result of one run.

    Attributes:
        outcomes: number of requests by status; "0" without a response, "wrong" for a 200 without
            all its vectors.
        milliseconds: latencies of successful requests from the scheduled time, by kind.
        late: delay of the generator, in milliseconds from the scheduled time to sending, of all
            requests.
        texts: number of texts in successful requests.
        seconds: duration from the start to the last response.
        generator_cores: CPU seconds of this process per second.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    milliseconds: dict[str, list[float]] = field(default_factory=dict)
    late: list[float] = field(default_factory=list)
    texts: int = 0
    seconds: float = 0.0
    generator_cores: float = 0.0

    @property
    def answered(self) -> int:
        """Number of successful requests."""
        return self.outcomes["200"]


class Traffic(FastHttpUser):
    """The only user of locust, which sends all requests; arrivals.py has the reason."""

    concurrency = 1 << 16
    connection_timeout = TIMEOUT_SECONDS
    network_timeout = TIMEOUT_SECONDS

    @task
    def drive(self) -> None:
        """Run the plan once."""
        options = self.environment.parsed_options
        try:
            options.plan.drive(self.send)
        finally:
            options.done.set()
        raise StopUser

    def send(self, request: Request, due: float) -> None:
        """Send one request; report its latency from the scheduled time to locust's listeners."""
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
                if not is_complete(request, kind, answer.content):
                    answer.failure("wrong")


def drive(url: str, plan: OpenLoop | ClosedLoop) -> RunResult:
    """Run a plan against a server; return when all responses have arrived."""
    result = RunResult()
    options = argparse.Namespace(plan=plan, done=Event())
    environment = Environment(user_classes=[Traffic], host=url, parsed_options=options)

    def record(
        response_time: float, response: Any, exception: Any, context: dict[str, Any], **_: Any
    ) -> None:
        request: Request = context["request"]
        result.late.append(context["late"])
        status = response.status_code
        outcome = "wrong" if status == 200 and exception else str(status)
        result.outcomes[outcome] += 1
        if outcome == "200":
            result.milliseconds.setdefault(request.kind, []).append(response_time)
            result.texts += request.texts

    environment.events.request.add_listener(record)
    runner = environment.create_local_runner()
    started, cpu_started = time.perf_counter(), time.process_time()
    runner.start(1, spawn_rate=1)
    options.done.wait()
    result.seconds = time.perf_counter() - started
    result.generator_cores = (time.process_time() - cpu_started) / result.seconds
    runner.quit()
    return result
