"""Metrics of a pool of engine servers; see ``taskvec.engines.remote.pool_server.PoolObserver``."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from taskvec.engines.base import CallOutcome
from taskvec.metrics.engine import DURATION_BUCKETS


class PoolMetrics:
    """Observer of a pool of engine servers."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Declare the metrics in a registry; a server's series appear once it is in the pool."""
        self._server_serving = Gauge(
            "taskvec_engine_server_serving",
            "Which engine servers passed their check and may be called (1), which not (0)?",
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
            buckets=DURATION_BUCKETS,
            registry=registry,
        )
        self._retries = Counter(
            "taskvec_engine_retries",
            "How many failed calls to engine servers were sent again?",
            registry=registry,
        )
        self._lookup_failures = Counter(
            "taskvec_engine_lookup_failures",
            "How often did resolving the name of engine servers fail?",
            registry=registry,
        )

    def server_changed(self, server: str, *, serving: bool) -> None:
        """Set whether a server may be called; see ``PoolObserver``."""
        self._server_serving.labels(server).set(1 if serving else 0)
        for outcome in CallOutcome:
            self._calls.labels(server, outcome)

    def server_left(self, server: str) -> None:
        """Remove the series of a server that left the pool; see ``PoolObserver``."""
        self._server_serving.remove(server)
        for outcome in CallOutcome:
            self._calls.remove(server, outcome)

    def call_ended(self, server: str, outcome: str, seconds: float) -> None:
        """Count one call and observe its duration; see ``PoolObserver``."""
        self._calls.labels(server, outcome).inc()
        self._call_seconds.observe(seconds)

    def call_retried(self) -> None:
        """Count one retry; see ``PoolObserver``."""
        self._retries.inc()

    def lookup_failed(self) -> None:
        """Count one failed DNS lookup; see ``PoolObserver``."""
        self._lookup_failures.inc()
