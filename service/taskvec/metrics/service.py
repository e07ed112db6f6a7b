"""Prometheus series, each with the question it answers; all present before the first request."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache
from itertools import product
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from taskvec.auth.keys import NO_KEY
from taskvec.core.postprocess import OutputFormat
from taskvec.errors import CODES
from taskvec.metrics.cache import CacheMetrics
from taskvec.metrics.engine import SECONDS, EngineMetrics
from taskvec.metrics.pool import PoolMetrics
from taskvec.metrics.process import SHARED_FOLDER, ProcessMetrics
from taskvec.telemetry.stages import STAGES, Stage

STATUSES = (
    "200",
    "400",
    "401",
    "404",
    "405",
    "408",
    "413",
    "415",
    "429",
    "499",
    "500",
    "503",
    "504",
)
NO_TASK = "none"
"""Task label of requests that failed before their task was known."""

OTHER_CODE = "other"
"""Code label of an error whose code ``taskvec.errors`` does not list."""

OUTPUTS = ("float", "int8", "uint8", "binary", "ubinary", "float16")
TRANSPORTS = ("numbers", "base64", "raw")
_STAGE_SECONDS = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0,
    10.0, 30.0, 60.0,
)  # fmt: skip


class Metrics(ProcessMetrics, EngineMetrics, PoolMetrics, CacheMetrics):
    """The series of one service; also the observer that its engine reports to."""

    def __init__(self, tasks: Iterable[str]) -> None:
        """Declare everything and make every label appear.

        Args:
            tasks: task names that will be used as labels.
        """
        self.registry = CollectorRegistry()
        ProcessMetrics.__init__(self, self.registry)
        EngineMetrics.__init__(self, self.registry)
        PoolMetrics.__init__(self, self.registry)
        CacheMetrics.__init__(self, self.registry)
        self._requests = Counter(
            "taskvec_requests",
            "How many embedding requests ended, by task and HTTP status (499: client left)?",
            ("task", "status"),
            registry=self.registry,
        )
        self._texts = Counter(
            "taskvec_texts",
            "How many texts did ended requests carry, by task and status?",
            ("task", "status"),
            registry=self.registry,
        )
        self._tokens = Counter(
            "taskvec_tokens",
            "How many tokens did answered requests have, by task and status?",
            ("task", "status"),
            registry=self.registry,
        )
        self._request_seconds = Histogram(
            "taskvec_request_seconds",
            "How long does an embedding request take, body to answer, by task?",
            ("task",),
            buckets=SECONDS,
            registry=self.registry,
        )
        stage_seconds = Histogram(
            "taskvec_stage_seconds",
            "In which stage do embedding requests spend their time?",
            ("stage",),
            buckets=_STAGE_SECONDS,
            registry=self.registry,
        )
        answers = Counter(
            "taskvec_answers",
            "In which number type and transport are vectors asked for and given?",
            ("output", "transport"),
            registry=self.registry,
        )
        rejected = Counter(
            "taskvec_rejected",
            "Why were embedding requests not answered, by the code that the client saw?",
            ("code",),
            registry=self.registry,
        )
        self._key_requests = Counter(
            "taskvec_key_requests",
            "How many embedding requests ended, by API key and HTTP status?",
            ("key", "status"),
            registry=self.registry,
        )
        self._key_tokens = Counter(
            "taskvec_key_tokens",
            "How many tokens did answered requests have, by API key?",
            ("key",),
            registry=self.registry,
        )
        self._limits_unchecked = Counter(
            "taskvec_limits_unchecked",
            "How many limits of API keys could not be checked, as Redis was down?",
            registry=self.registry,
        )
        self._in_flight = Gauge(
            "taskvec_requests_in_flight",
            "How many embedding requests are being worked on?",
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self._of_task = cache(self._find_of_task)
        self._of_key = cache(self._find_of_key)
        for task, status in product((*tasks, NO_TASK), STATUSES):
            self._of_task(task, status)
        self._seconds_by_task = {
            task: self._request_seconds.labels(task) for task in (*tasks, NO_TASK)
        }
        self._by_stage = {stage: stage_seconds.labels(stage) for stage in STAGES}
        self._by_output = {
            (output, transport): answers.labels(output, transport)
            for output in OUTPUTS
            for transport in TRANSPORTS
            if output != "float16" or transport == "raw"
        }
        self._by_code = {code: rejected.labels(code) for code in (*CODES, OTHER_CODE)}
        self.keys_changed([])

    def keys_changed(self, names: Iterable[str]) -> None:
        """The API keys that requests may have from now on; what others counted stays."""
        for name, status in product((*names, NO_KEY), STATUSES):
            self._of_key(name, status)

    def _find_of_task(self, task: str, status: str) -> tuple[Counter, Counter, Counter]:
        labels = task, status
        return (
            self._requests.labels(*labels),
            self._texts.labels(*labels),
            self._tokens.labels(*labels),
        )

    def _find_of_key(self, name: str, status: str) -> tuple[Counter, Counter]:
        return self._key_requests.labels(name, status), self._key_tokens.labels(name)

    def limit_unchecked(self) -> None:
        """See ``LimitObserver``."""
        self._limits_unchecked.inc()

    def request_started(self) -> None:
        """An embedding request arrived."""
        self._in_flight.inc()

    def request_ended(
        self,
        task: str | None,
        status: int,
        *,
        texts: int,
        tokens: int,
        seconds: float,
        stages: Iterable[Stage] = (),
        output: OutputFormat | None = None,
        code: str | None = None,
        key: str | None = None,
    ) -> None:
        """An embedding request was answered, refused or given up.

        Args:
            task: None where it failed before its task was known.
            status: of the answer; 499 where the client left.
            texts: how many it carried.
            tokens: how many were embedded.
            seconds: from its first byte to its answer.
            stages: those that it went through.
            output: format of the vectors; counted if they were returned.
            code: of the error that it got; None for a good answer.
            key: name of the API key; None where there was none.
        """
        self._in_flight.dec()
        name = task or NO_TASK
        label = str(status)
        requests, texts_total, tokens_total = self._of_task(name, label)
        requests.inc()
        texts_total.inc(texts)
        tokens_total.inc(tokens)
        self._seconds_by_task[name].observe(seconds)
        for stage in stages:
            self._by_stage[stage.name].observe(stage.seconds)
        if code is not None:
            self._by_code.get(code, self._by_code[OTHER_CODE]).inc()
        elif output is not None:
            for kind in output.types:
                self._by_output[kind.value, output.encoding.value].inc()
        key_requests, key_tokens = self._of_key(key or NO_KEY, label)
        key_requests.inc()
        key_tokens.inc(tokens)

    def render(self, state: str) -> bytes:
        """All series in Prometheus' text format; of all processes where several share them.

        Args:
            state: the engine's, as this process sees it.
        """
        self.engine_state(state)
        self.let_time_pass()
        shared = os.environ.get(SHARED_FOLDER)
        if shared is None:
            return generate_latest(self.registry)
        _forget_dead_processes(Path(shared))
        registry = CollectorRegistry()
        MultiProcessCollector(registry, shared)  # type: ignore[no-untyped-call]
        return generate_latest(registry)


def _forget_dead_processes(shared: Path) -> None:
    """Remove the live gauges of processes that are gone; what they counted stays."""
    for file in shared.glob("gauge_live*_*.db"):
        process = int(file.stem.rpartition("_")[2])
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            file.unlink(missing_ok=True)
