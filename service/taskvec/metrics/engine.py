"""The series of an engine in this process; see ``taskvec.engines.base.EngineObserver``."""

from __future__ import annotations

import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from taskvec.engines.base import DropReason

SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
)  # fmt: skip
_FILL = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
_TOKENS = tuple(float(4**n) for n in range(1, 10))


class EngineMetrics:
    """What an engine reports to."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Declare the series."""
        self._queue_texts = Gauge(
            "taskvec_queue_texts",
            "How many texts wait for a forward (vllm, remote: or are in one)?",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._queue_tokens = Gauge(
            "taskvec_queue_tokens",
            "How many tokens wait for a forward (vllm, remote: or are in one)?",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._queue_oldest = Gauge(
            "taskvec_queue_oldest_seconds",
            "How long has the oldest text waited (vllm, remote: or is in a forward)?",
            registry=registry,
            multiprocess_mode="livemax",
        )
        self._queue_seconds = Histogram(
            "taskvec_queue_seconds",
            "How long does a request wait for its first forward?",
            buckets=SECONDS,
            registry=registry,
        )
        self._batch_texts = Histogram(
            "taskvec_batch_texts",
            "How many texts does a forward hold?",
            buckets=_TOKENS,
            registry=registry,
        )
        self._batch_tokens = Histogram(
            "taskvec_batch_tokens",
            "How many tokens does a forward hold: are batches full?",
            buckets=_TOKENS,
            registry=registry,
        )
        self._batch_fill = Histogram(
            "taskvec_batch_fill_ratio",
            "Which share of its token budget does a forward use (above 1: one text over it)?",
            buckets=_FILL,
            registry=registry,
        )
        self._forward_seconds = Histogram(
            "taskvec_forward_seconds",
            "How long does a forward take?",
            buckets=SECONDS,
            registry=registry,
        )
        self._batch_budget = Gauge(
            "taskvec_batch_budget_tokens",
            "How many tokens may a forward hold (fewer after memory ran out; 0: not known)?",
            registry=registry,
            multiprocess_mode="livemax",
        )
        self._out_of_memory = Counter(
            "taskvec_out_of_memory",
            "How many forwards did not fit into memory and were split?",
            registry=registry,
        )
        self._dropped = Counter(
            "taskvec_texts_dropped",
            "How many texts left the queue unembedded, by reason?",
            ("reason",),
            registry=registry,
        )
        self._oldest: float | None = None
        for reason in DropReason:
            self._dropped.labels(reason)

    def queue_changed(self, texts: int, tokens: int, oldest: float | None) -> None:
        """See ``EngineObserver``."""
        self._oldest = oldest
        self._queue_texts.set(texts)
        self._queue_tokens.set(tokens)

    def batch_started(self, waited: Sequence[float]) -> None:
        """See ``EngineObserver``."""
        for seconds in waited:
            self._queue_seconds.observe(seconds)

    def batch_finished(self, texts: int, tokens: int, seconds: float, budget: int) -> None:
        """See ``EngineObserver``."""
        self._batch_budget.set(budget)
        self._batch_fill.observe(tokens / budget)
        self._batch_texts.observe(texts)
        self._batch_tokens.observe(tokens)
        self._forward_seconds.observe(seconds)

    def memory_ran_out(self, budget: int) -> None:
        """See ``EngineObserver``."""
        self._out_of_memory.inc()
        self._batch_budget.set(budget)

    def texts_dropped(self, reason: DropReason, texts: int) -> None:
        """See ``EngineObserver``."""
        self._dropped.labels(reason).inc(texts)

    def let_time_pass(self) -> None:
        """Renew what changes while nothing happens: the age of what waits."""
        oldest = self._oldest
        self._queue_oldest.set(0.0 if oldest is None else time.monotonic() - oldest)
