"""All metrics of one service, and their text format for Prometheus.

Every series with known label values exists before the first request, so that a rate sees the first
event. The help text of each metric is the question that it answers.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from taskvec.metrics.cache import CacheMetrics
from taskvec.metrics.engine import EngineMetrics
from taskvec.metrics.pool import PoolMetrics
from taskvec.metrics.process import MULTIPROCESS_VARIABLE, ProcessMetrics
from taskvec.metrics.requests import RequestMetrics


class Metrics(ProcessMetrics, EngineMetrics, PoolMetrics, CacheMetrics, RequestMetrics):
    """The metrics of one service; the observer of all its parts.

    Attributes:
        registry: of these metrics alone, so that two services in one process do not mix.
    """

    def __init__(self, tasks: Iterable[str]) -> None:
        """Declare all metrics and create their series.

        Args:
            tasks: names of the served tasks; label values.
        """
        self.registry = CollectorRegistry()
        ProcessMetrics.__init__(self, self.registry)
        EngineMetrics.__init__(self, self.registry)
        PoolMetrics.__init__(self, self.registry)
        CacheMetrics.__init__(self, self.registry)
        RequestMetrics.__init__(self, self.registry, tasks)

    def render(self, state: str) -> bytes:
        """Return all series in Prometheus' text format, summed over processes that share them.

        Args:
            state: the engine's state as this process sees it, a value of ``EngineState``.
        """
        self.engine_state(state)
        self.update_queue_age()
        shared = os.environ.get(MULTIPROCESS_VARIABLE)
        if shared is None:
            return generate_latest(self.registry)
        _remove_gauges_of_dead_processes(Path(shared))
        registry = CollectorRegistry()
        MultiProcessCollector(registry, shared)  # type: ignore[no-untyped-call]
        return generate_latest(registry)


def _remove_gauges_of_dead_processes(shared: Path) -> None:
    """Delete the live gauges of processes that have ended; their counters stay."""
    for file in shared.glob("gauge_live*_*.db"):
        process = int(file.stem.rpartition("_")[2])
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            file.unlink(missing_ok=True)
