"""Metrics of a process: build, engine state, event loop, interpreter lock, memory, tokenizer."""

from __future__ import annotations

import os

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    ProcessCollector,
)

from taskvec.engines.base import EngineState
from taskvec.memory_limits import MemoryUse
from taskvec.metrics.recent_maximum import RecentMaximum

MULTIPROCESS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable that enables prometheus_client's multiprocess mode: the folder in which
processes share their series. It must be set before prometheus_client is imported."""

_LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)


class ProcessMetrics:
    """Observer of the application, its event loop, its memory and its tokenizer."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Declare the metrics in a registry.

        Python's own collectors are registered only if the series are of one process.
        """
        self._build = Gauge(
            "taskvec_build_info",
            "Which version serves which model with which engine (always 1)?",
            ("version", "model", "engine"),
            registry=registry,
            multiprocess_mode="livemax",
        )
        self._ready = Gauge(
            "taskvec_engine_ready",
            "Is the engine ready to answer (1 or 0)?",
            registry=registry,
            multiprocess_mode="livemostrecent",
        )
        states = Gauge(
            "taskvec_engine_state",
            "In which state is the engine (1 for that state, 0 for the others)?",
            ("state",),
            registry=registry,
            multiprocess_mode="livemostrecent",
        )
        self._loop_lag = Histogram(
            "taskvec_event_loop_lag_seconds",
            "How late does the event loop run a timer: is something blocking it?",
            buckets=_LAG_BUCKETS,
            registry=registry,
        )
        self._longest_turn = Gauge(
            "taskvec_event_loop_longest_turn_seconds",
            "What was the longest turn of the event loop in the last minute (10 ms less)?",
            registry=registry,
            multiprocess_mode="livemax",
        )
        self._longest_hold = Gauge(
            "taskvec_interpreter_lock_longest_hold_seconds",
            "For how long was the interpreter lock held in one go, at most in the last minute?",
            registry=registry,
            multiprocess_mode="livemax",
        )
        self._memory_limit = Gauge(
            "taskvec_memory_limit_bytes",
            "What is the tightest memory limit, of a cgroup or ulimit -v (0: there is none)?",
            registry=registry,
            multiprocess_mode="livemax",
        )
        self._memory_used = Gauge(
            "taskvec_memory_used_bytes",
            "How much of that limit is used, without page cache that can be reclaimed?",
            registry=registry,
            multiprocess_mode="livemax",
        )
        self._memory_pressure = Gauge(
            "taskvec_memory_pressure",
            "What is refused for lack of memory (0: nothing; 1: bulk and large requests; "
            "2: embedding requests; 3: all but health checks and metrics)?",
            registry=registry,
            multiprocess_mode="livemax",
        )
        self._memory_budget = Gauge(
            "taskvec_memory_budget_bytes",
            "How much memory may requests hold: bodies, texts, token ids, vectors, answers?",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._memory_held = Gauge(
            "taskvec_memory_held_bytes",
            "How much memory do requests hold?",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._recent_turn, self._recent_hold = RecentMaximum(), RecentMaximum()
        self._tokenizer_busy = Gauge(
            "taskvec_tokenizer_threads_busy",
            "How many tokenizer threads are busy?",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._tokenizer_waiting = Gauge(
            "taskvec_tokenizer_requests_waiting",
            "How many requests wait for a tokenizer thread: are there too few?",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._texts_cut = Counter(
            "taskvec_texts_truncated",
            "How many texts were too long and were truncated, as `truncate: true` allows?",
            registry=registry,
        )
        self._tokens_cut = Counter(
            "taskvec_tokens_truncated",
            "How many tokens were truncated (very long texts: an estimate)?",
            registry=registry,
        )
        self._states = {state.value: states.labels(state.value) for state in EngineState}
        if MULTIPROCESS_VARIABLE not in os.environ:
            ProcessCollector(registry=registry)
            GCCollector(registry=registry)

    def describe(self, *, version: str, model: str, engine: str) -> None:
        """Set the labels of the build: version, served model name, engine kind."""
        self._build.labels(version, model, engine).set(1)

    def engine_state(self, state: str) -> None:
        """Set the engine's state, a value of ``EngineState``."""
        for name, gauge in self._states.items():
            gauge.set(1 if name == state else 0)
        self._ready.set(1 if state == EngineState.READY.value else 0)

    def loop_late(self, seconds: float) -> None:
        """Observe the largest lateness of a timer in the last quarter of a second, in seconds."""
        self._loop_lag.observe(seconds)
        self._longest_turn.set(self._recent_turn.add(seconds))

    def lock_held(self, seconds: float) -> None:
        """Observe the longest hold of the interpreter lock, see ``InterpreterLockMonitor``."""
        self._longest_hold.set(self._recent_hold.add(seconds))

    def memory_budget(self, size: int) -> None:
        """Set the bytes that requests may hold."""
        self._memory_budget.set(size)

    def memory_read(self, use: MemoryUse | None, level: int, held: int) -> None:
        """Set limit, use and what is refused; see ``PressureObserver``."""
        self._memory_limit.set(use.limit if use else 0)
        self._memory_used.set(use.used if use else 0)
        self._memory_pressure.set(level)
        self._memory_held.set(held)

    def tokenizer_changed(self, busy: int, waiting: int) -> None:
        """Set the number of busy threads and waiting requests; see ``TokenizerObserver``."""
        self._tokenizer_busy.set(busy)
        self._tokenizer_waiting.set(waiting)

    def text_cut(self, tokens: int) -> None:
        """Count one truncated text and the tokens it lost; see ``TokenizerObserver``."""
        self._texts_cut.inc()
        self._tokens_cut.inc(tokens)
