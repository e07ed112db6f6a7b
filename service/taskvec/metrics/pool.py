"""The series of a pool of engine servers; see ``taskvec.engines.remote.server.PoolObserver``."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from taskvec.metrics.engine import SECONDS

CALL_OUTCOMES = ("ok", "busy", "unreachable", "error", "timeout", "wrong", "abandoned")


class PoolMetrics:
    """What a pool reports to."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Declare the series; those of a server appear when it is listed."""
        self._server_serving = Gauge(
            "taskvec_engine_server_serving",
            "Which engine servers are proven and may be called (1), which not (0)?",
            ("server",),
            registry=registry,
            multiprocess_mode="livemostrecent",
        )
        self._calls = Counter(
            "taskvec_engine_calls",
            "How many calls to engine servers ended, by server and outcome?",
            ("server", "outcome"),
            registry=registry,
        )
        self._call_seconds = Histogram(
            "taskvec_engine_call_seconds",
            "How long does a call to an engine server take?",
            buckets=SECONDS,
            registry=registry,
        )
        self._retries = Counter(
            "taskvec_engine_retries",
            "How many failed calls to engine servers were sent again?",
            registry=registry,
        )
        self._lookup_failures = Counter(
            "taskvec_engine_lookup_failures",
            "How often could the name of engine servers not be resolved?",
            registry=registry,
        )

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
