"""The series of what a process is and how it copes: event loop, tokenizer threads, engine state."""

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

SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""The variable under which processes share their series; see prometheus_client's multiprocess
mode. It must be set before prometheus_client is imported."""

ENGINE_STATES = ("starting", "ready", "unavailable", "stopping", "dead")
_LATE = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)


class ProcessMetrics:
    """What the application and its tokenizer report to."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Declare the series, and Python's own where one process has them to itself."""
        self._build = Gauge(
            "taskvec_build_info",
            "Which version serves which model with which engine (always 1)?",
            ("version", "model", "engine"),
            registry=registry,
            multiprocess_mode="livemax",
        )
        self._ready = Gauge(
            "taskvec_engine_ready",
            "Would the engine answer now (1 or 0)?",
            registry=registry,
            multiprocess_mode="livemostrecent",
        )
        states = Gauge(
            "taskvec_engine_state",
            "In which state is the engine (1 for it, 0 for the others)?",
            ("state",),
            registry=registry,
            multiprocess_mode="livemostrecent",
        )
        self._loop_lag = Histogram(
            "taskvec_event_loop_lag_seconds",
            "How much too late does the event loop wake a timer: is something blocking it?",
            buckets=_LATE,
            registry=registry,
        )
        self._tokenizer_busy = Gauge(
            "taskvec_tokenizer_threads_busy",
            "How many tokenizer threads are at work?",
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
            "How many texts were too long and cut, as truncate: true allows?",
            registry=registry,
        )
        self._tokens_cut = Counter(
            "taskvec_tokens_truncated",
            "How many tokens were cut off (of very long texts estimated: their end is not read)?",
            registry=registry,
        )
        self._states = {state: states.labels(state) for state in ENGINE_STATES}
        if SHARED_FOLDER not in os.environ:
            ProcessCollector(registry=registry)
            GCCollector(registry=registry)

    def describe(self, *, version: str, model: str, engine: str) -> None:
        """Say what is served."""
        self._build.labels(version, model, engine).set(1)

    def engine_state(self, state: str) -> None:
        """The engine is in this one of ``ENGINE_STATES``."""
        for name, gauge in self._states.items():
            gauge.set(1 if name == state else 0)
        self._ready.set(1 if state == "ready" else 0)

    def loop_late(self, seconds: float) -> None:
        """The event loop woke a timer so much too late."""
        self._loop_lag.observe(seconds)

    def tokenizer_changed(self, busy: int, waiting: int) -> None:
        """See ``TokenizerObserver``."""
        self._tokenizer_busy.set(busy)
        self._tokenizer_waiting.set(waiting)

    def text_cut(self, tokens: int) -> None:
        """See ``TokenizerObserver``."""
        self._texts_cut.inc()
        self._tokens_cut.inc(tokens)
