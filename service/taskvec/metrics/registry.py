"""All metrics of one service, and their text format for Prometheus.

Every series with known label values exists before the first request, so that a rate sees the first
event. The help text of each metric is the question that it answers.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector

from taskvec.metrics.cache import CacheMetrics
from taskvec.metrics.engine import EngineMetrics
from taskvec.metrics.pool import PoolMetrics
from taskvec.metrics.process import MULTIPROCESS_VARIABLE, ProcessMetrics
from taskvec.metrics.requests import RequestMetrics

MERGED = "ended"
"""Stands for the process in the names of the files with the sums of processes that have ended."""


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

    def loop_late(self, seconds: float) -> None:
        """See ``ProcessMetrics.loop_late``; the age of the queue is kept up to date as well."""
        super().loop_late(seconds)
        self.update_queue_age()

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
        merge_dead_processes(Path(shared))
        registry = CollectorRegistry()
        MultiProcessCollector(registry, shared)  # type: ignore[no-untyped-call]
        with _locked(Path(shared), exclusive=False):
            return generate_latest(registry)


def merge_dead_processes(shared: Path) -> None:
    """Remove the files of ended processes: live gauges, and counters after adding them up.

    Without this, each process that was replaced leaves its files behind, and they are read at every
    scrape.
    """
    with _locked(shared, exclusive=True):
        for file in shared.glob("*_*.db"):
            kind, _, process = file.stem.rpartition("_")
            if process == MERGED or not process.isdecimal() or _alive(int(process)):
                continue
            if kind.startswith("gauge") and not kind.startswith("gauge_live"):
                continue  # it counts after the end of its process
            if not kind.startswith("gauge"):
                _add(shared / f"{kind}_{MERGED}.db", file)
            file.unlink(missing_ok=True)


def _add(total: Path, file: Path) -> None:
    """Add the values of a file of counters to those of another."""
    values = MmapedDict(str(total))  # type: ignore[no-untyped-call]
    try:
        added = MmapedDict.read_all_values_from_file(str(file))  # type: ignore[no-untyped-call]
        for key, value, timestamp, _ in added:
            before, _ = values.read_value(key)  # type: ignore[no-untyped-call]
            values.write_value(key, before + value, timestamp)  # type: ignore[no-untyped-call]
    finally:
        values.close()  # type: ignore[no-untyped-call]


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@contextmanager
def _locked(shared: Path, *, exclusive: bool) -> Iterator[None]:
    """Hold the lock of a folder: no process reads files while another one merges them."""
    with (shared / "lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield  # closing the file frees the lock
