"""Metrics of an engine on this machine; see ``taskvec.engines.base.EngineObserver``."""

from __future__ import annotations

import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from taskvec.engines.base import DropReason
from taskvec.metrics.recent_maximum import RecentMaximum

DURATION_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
)  # fmt: skip
"""Histogram buckets in seconds, from a millisecond to five minutes."""

_FILL_BUCKETS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
_COUNT_BUCKETS = tuple(float(4**n) for n in range(1, 10))


class EngineMetrics:
    """Observer of an engine."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Declare the metrics in a registry."""
        self._queue_texts = Gauge(
            "taskvec_queue_texts",
            "How many texts wait for a forward pass (vllm, remote: or are in one)?",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._queue_tokens = Gauge(
            "taskvec_queue_tokens",
            "How many tokens wait for a forward pass (vllm, remote: or are in one)?",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._queue_oldest = Gauge(
            "taskvec_queue_oldest_seconds",
            "How long has the oldest text waited (vllm, remote: or been in a forward pass)?",
            registry=registry,
            multiprocess_mode="livemax",
        )
        self._queue_seconds = Histogram(
            "taskvec_queue_seconds",
            "How long does a request wait for its first forward pass?",
            buckets=DURATION_BUCKETS,
            registry=registry,
        )
        self._batch_texts = Histogram(
            "taskvec_batch_texts",
            "How many texts does a forward pass contain?",
            buckets=_COUNT_BUCKETS,
            registry=registry,
        )
        self._batch_tokens = Histogram(
            "taskvec_batch_tokens",
            "How many tokens does a forward pass contain: are batches full?",
            buckets=_COUNT_BUCKETS,
            registry=registry,
        )
        self._batch_fill = Histogram(
            "taskvec_batch_fill_ratio",
            "Which share of its token budget does a forward pass use (above 1: one larger text)?",
            buckets=_FILL_BUCKETS,
            registry=registry,
        )
        self._forward_seconds = Histogram(
            "taskvec_forward_seconds",
            "How long does a forward pass take?",
            buckets=DURATION_BUCKETS,
            registry=registry,
        )
        self._pause_seconds = Histogram(
            "taskvec_forward_pause_seconds",
            "How long is a bulk forward pass paused for an interactive one, and how often?",
            buckets=DURATION_BUCKETS,
            registry=registry,
        )
        self._batch_budget = Gauge(
            "taskvec_batch_budget_tokens",
            "How many tokens may a forward pass contain (lower after out of memory; 0: unknown)?",
            registry=registry,
            multiprocess_mode="livemax",
        )
        self._out_of_memory = Counter(
            "taskvec_out_of_memory",
            "How many forward passes ran out of memory and were split?",
            registry=registry,
        )
        self._dropped = Counter(
            "taskvec_texts_dropped",
            "How many texts left the queue without being embedded, by reason?",
            ("reason",),
            registry=registry,
        )
        self._process_memory = Gauge(
            "taskvec_engine_process_resident_bytes",
            "How much memory does the engine's process have (0: it is in no process of its own)?",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._process_restarts = Counter(
            "taskvec_engine_process_restarts",
            "How often was the engine's process replaced because it had ended?",
            registry=registry,
        )
        self._process_turn = Gauge(
            "taskvec_engine_process_event_loop_longest_turn_seconds",
            "What was the longest turn of the event loop of the engine's process in the last "
            "minute (10 ms less; 0: it is in no process of its own)?",
            registry=registry,
            multiprocess_mode="livemax",
        )
        self._process_hold = Gauge(
            "taskvec_engine_process_interpreter_lock_longest_hold_seconds",
            "For how long was the interpreter lock of the engine's process held in one go, at most "
            "in the last minute (0: it is in no process of its own)?",
            registry=registry,
            multiprocess_mode="livemax",
        )
        self._recent_process_turn, self._recent_process_hold = RecentMaximum(), RecentMaximum()
        self._oldest: float | None = None
        self._age_is_shown = False
        for reason in DropReason:
            self._dropped.labels(reason)

    def queue_changed(self, texts: int, tokens: int, oldest: float | None) -> None:
        """Set the queue's size and the arrival of its oldest text; see ``EngineObserver``."""
        self._oldest = oldest
        if oldest is None and self._age_is_shown:
            self.update_queue_age()
        self._queue_texts.set(texts)
        self._queue_tokens.set(tokens)

    def batch_started(self, waited: Sequence[float]) -> None:
        """Observe the waiting times of requests, in seconds; see ``EngineObserver``."""
        for seconds in waited:
            self._queue_seconds.observe(seconds)

    def batch_finished(self, texts: int, tokens: int, seconds: float, budget: int) -> None:
        """Observe one forward pass; see ``EngineObserver``."""
        self._batch_budget.set(budget)
        self._batch_fill.observe(tokens / budget)
        self._batch_texts.observe(texts)
        self._batch_tokens.observe(tokens)
        self._forward_seconds.observe(seconds)

    def forward_paused(self, seconds: float) -> None:
        """Observe one pause; see ``EngineObserver``."""
        self._pause_seconds.observe(seconds)

    def memory_ran_out(self, budget: int) -> None:
        """Count one out-of-memory error; see ``EngineObserver``."""
        self._out_of_memory.inc()
        self._batch_budget.set(budget)

    def texts_dropped(self, reason: DropReason, texts: int) -> None:
        """Count texts that were not embedded; see ``EngineObserver``."""
        self._dropped.labels(reason).inc(texts)

    def process_memory(self, resident: int) -> None:
        """Set the bytes of the engine's process; see ``ProcessObserver``."""
        self._process_memory.set(resident)

    def process_loop_late(self, seconds: float) -> None:
        """Observe how late the event loop of the engine's process was; see ``ProcessObserver``."""
        self._process_turn.set(self._recent_process_turn.add(seconds))

    def process_lock_held(self, seconds: float) -> None:
        """Observe a hold of the interpreter lock of the engine's process."""
        self._process_hold.set(self._recent_process_hold.add(seconds))

    def process_restarted(self) -> None:
        """Count a process of the engine that replaces one that has ended."""
        self._process_restarts.inc()

    def update_queue_age(self) -> None:
        """Set the age of the oldest text in the queue, in seconds; called before each scrape."""
        oldest = self._oldest
        self._age_is_shown = oldest is not None
        self._queue_oldest.set(0.0 if oldest is None else time.monotonic() - oldest)
