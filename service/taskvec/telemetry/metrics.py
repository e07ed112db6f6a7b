"""Prometheus series, each with the question it answers; all present before the first request."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from taskvec.access.keys import NO_KEY

SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""The variable under which processes share their series; see prometheus_client's multiprocess
mode. It must be set before prometheus_client is imported."""

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

CALL_OUTCOMES = ("ok", "busy", "unreachable", "error", "timeout", "wrong", "abandoned")
DROP_REASONS = ("cancelled", "expired", "failed")
_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
)  # fmt: skip
_TOKENS = tuple(float(4**n) for n in range(1, 10))


class Metrics:
    """The series of one service; also the observer that its engine reports to."""

    def __init__(self, tasks: Iterable[str]) -> None:
        """Declare everything and make every label appear.

        Args:
            tasks: task names that will be used as labels.
        """
        self.registry = CollectorRegistry()
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
            "How many tokens were embedded for answered requests, by task and status?",
            ("task", "status"),
            registry=self.registry,
        )
        self._request_seconds = Histogram(
            "taskvec_request_seconds",
            "How long does an embedding request take, body to answer, by task?",
            ("task",),
            buckets=_SECONDS,
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
            "How many tokens were embedded for answered requests, by API key?",
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
        self._queue_texts = Gauge(
            "taskvec_queue_texts",
            "How many texts wait for a forward (vllm: or are in one)?",
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self._queue_tokens = Gauge(
            "taskvec_queue_tokens",
            "How many tokens wait for a forward (vllm: or are in one)?",
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self._queue_seconds = Histogram(
            "taskvec_queue_seconds",
            "How long does a request wait for its first forward?",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._batch_texts = Histogram(
            "taskvec_batch_texts",
            "How many texts does a forward hold?",
            buckets=_TOKENS,
            registry=self.registry,
        )
        self._batch_tokens = Histogram(
            "taskvec_batch_tokens",
            "How many tokens does a forward hold: are batches full?",
            buckets=_TOKENS,
            registry=self.registry,
        )
        self._forward_seconds = Histogram(
            "taskvec_forward_seconds",
            "How long does a forward take?",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._dropped = Counter(
            "taskvec_texts_dropped",
            "How many texts left the queue unembedded, by reason?",
            ("reason",),
            registry=self.registry,
        )
        self._ready = Gauge(
            "taskvec_engine_ready",
            "Would the engine answer now (1 or 0)?",
            registry=self.registry,
            multiprocess_mode="livemostrecent",
        )
        self._server_serving = Gauge(
            "taskvec_engine_server_serving",
            "Which engine servers are proven and may be called (1), which not (0)?",
            ("server",),
            registry=self.registry,
            multiprocess_mode="livemostrecent",
        )
        self._calls = Counter(
            "taskvec_engine_calls",
            "How many calls to engine servers ended, by server and outcome?",
            ("server", "outcome"),
            registry=self.registry,
        )
        self._call_seconds = Histogram(
            "taskvec_engine_call_seconds",
            "How long does a call to an engine server take?",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._retries = Counter(
            "taskvec_engine_retries",
            "How many failed calls to engine servers were sent again?",
            registry=self.registry,
        )
        self._lookup_failures = Counter(
            "taskvec_engine_lookup_failures",
            "How often could the name of engine servers not be resolved?",
            registry=self.registry,
        )
        self._by_label = {
            (task, status): (
                self._requests.labels(task, status),
                self._texts.labels(task, status),
                self._tokens.labels(task, status),
            )
            for task in (*tasks, NO_TASK)
            for status in STATUSES
        }
        self._seconds_by_task = {
            task: self._request_seconds.labels(task) for task in (*tasks, NO_TASK)
        }
        self.keys_changed([])
        for reason in DROP_REASONS:
            self._dropped.labels(reason)

    def keys_changed(self, names: Iterable[str]) -> None:
        """The API keys that requests may have from now on; what others counted stays."""
        for name in (*names, NO_KEY):
            self._key_tokens.labels(name)
            for status in STATUSES:
                self._key_requests.labels(name, status)

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
        texts: int,
        tokens: int,
        seconds: float,
        *,
        key: str | None = None,
    ) -> None:
        """An embedding request was answered, refused or given up."""
        self._in_flight.dec()
        name = task or NO_TASK
        label = str(status)
        series = self._by_label.get((name, label))
        if series is None:
            series = (
                self._requests.labels(name, label),
                self._texts.labels(name, label),
                self._tokens.labels(name, label),
            )
        requests, texts_total, tokens_total = series
        requests.inc()
        texts_total.inc(texts)
        tokens_total.inc(tokens)
        self._seconds_by_task[name].observe(seconds)
        self._key_requests.labels(key or NO_KEY, label).inc()
        self._key_tokens.labels(key or NO_KEY).inc(tokens)

    def queue_changed(self, texts: int, tokens: int) -> None:
        """See ``EngineObserver``."""
        self._queue_texts.set(texts)
        self._queue_tokens.set(tokens)

    def batch_started(self, waited: Sequence[float]) -> None:
        """See ``EngineObserver``."""
        for seconds in waited:
            self._queue_seconds.observe(seconds)

    def batch_finished(self, texts: int, tokens: int, seconds: float) -> None:
        """See ``EngineObserver``."""
        self._batch_texts.observe(texts)
        self._batch_tokens.observe(tokens)
        self._forward_seconds.observe(seconds)

    def texts_dropped(self, reason: str, texts: int) -> None:
        """See ``EngineObserver``."""
        self._dropped.labels(reason).inc(texts)

    def server_changed(self, server: str, *, serving: bool) -> None:
        """See ``PoolObserver``."""
        self._server_serving.labels(server).set(1 if serving else 0)
        for outcome in CALL_OUTCOMES:
            self._calls.labels(server, outcome)

    def server_left(self, server: str) -> None:
        """See ``PoolObserver``."""
        self._server_serving.remove(server)
        for outcome in CALL_OUTCOMES:
            self._calls.remove(server, outcome)

    def call_ended(self, server: str, outcome: str, seconds: float) -> None:
        """See ``PoolObserver``."""
        self._calls.labels(server, outcome).inc()
        self._call_seconds.observe(seconds)

    def call_retried(self) -> None:
        """See ``PoolObserver``."""
        self._retries.inc()

    def lookup_failed(self) -> None:
        """See ``PoolObserver``."""
        self._lookup_failures.inc()

    def render(self, *, ready: bool) -> bytes:
        """All series in Prometheus' text format; of all processes where several share them."""
        self._ready.set(1 if ready else 0)
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
