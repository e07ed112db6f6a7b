"""Metrics of embedding requests: counts, texts, tokens, durations, stages, errors, API keys."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from itertools import product

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from taskvec.auth.keys import NO_KEY
from taskvec.core.output_format import Encoding, OutputFormat, OutputType
from taskvec.core.tasks import MIXED_TASKS
from taskvec.dialects import DialectName
from taskvec.errors import CODES
from taskvec.metrics.engine import DURATION_BUCKETS
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
"""Status labels whose series exist before the first request; 499 is a client that disconnected."""

NO_TASK = "none"
"""Task label of requests that failed before their task was known."""

OTHER_CODE = "other"
"""Code label of errors whose code ``taskvec.errors.CODES`` does not list."""

_STAGE_BUCKETS = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0,
    10.0, 30.0, 60.0,
)  # fmt: skip


class RequestMetrics:
    """Observer of embedding requests and of the limits of API keys."""

    def __init__(self, registry: CollectorRegistry, tasks: Iterable[str]) -> None:
        """Declare the metrics in a registry and create their series.

        Args:
            registry: where they are declared.
            tasks: names of the served tasks; label values.
        """
        tasks = (*tasks, MIXED_TASKS, NO_TASK)
        self._requests = Counter(
            "taskvec_requests",
            "How many embedding requests ended, by task and HTTP status (499: client left)?",
            ("task", "status"),
            registry=registry,
        )
        self._texts = Counter(
            "taskvec_texts",
            "How many texts did ended requests carry, by task and status?",
            ("task", "status"),
            registry=registry,
        )
        self._tokens = Counter(
            "taskvec_tokens",
            "How many tokens did answered requests have, by task and status?",
            ("task", "status"),
            registry=registry,
        )
        request_seconds = Histogram(
            "taskvec_request_seconds",
            "How long does an embedding request take, from its headers to its response, by task?",
            ("task",),
            buckets=DURATION_BUCKETS,
            registry=registry,
        )
        stage_seconds = Histogram(
            "taskvec_stage_seconds",
            "In which stage do embedding requests spend their time?",
            ("stage",),
            buckets=_STAGE_BUCKETS,
            registry=registry,
        )
        answers = Counter(
            "taskvec_answers",
            "Which number types and transports do answers have?",
            ("output", "transport"),
            registry=registry,
        )
        rejected = Counter(
            "taskvec_rejected",
            "Why were embedding requests not answered, by the code that the client saw?",
            ("code",),
            registry=registry,
        )
        by_dialect = Counter(
            "taskvec_dialect_requests",
            "How many embedding requests ended, by API dialect and HTTP status?",
            ("dialect", "status"),
            registry=registry,
        )
        self._key_requests = Counter(
            "taskvec_key_requests",
            "How many embedding requests ended, by API key and HTTP status?",
            ("key", "status"),
            registry=registry,
        )
        self._key_tokens = Counter(
            "taskvec_key_tokens",
            "How many tokens did answered requests have, by API key?",
            ("key",),
            registry=registry,
        )
        self._limits_unchecked = Counter(
            "taskvec_limits_unchecked",
            "How many limits of API keys could not be checked in Redis, because it was down?",
            registry=registry,
        )
        self._in_flight = Gauge(
            "taskvec_requests_in_flight",
            "How many embedding requests are in flight?",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._by_task = cache(self._find_by_task)
        self._by_key = cache(self._find_by_key)
        for task, status in product(tasks, STATUSES):
            self._by_task(task, status)
        self._seconds_by_task = {task: request_seconds.labels(task) for task in tasks}
        self._by_stage = {stage: stage_seconds.labels(stage) for stage in STAGES}
        self._by_output = cache(answers.labels)
        for output, encoding in product(OutputType, Encoding):
            if output is not OutputType.FLOAT16 or encoding is Encoding.RAW:
                self._by_output(output.value, encoding.value)
        self._by_dialect = cache(by_dialect.labels)
        for dialect, status in product(DialectName, STATUSES):
            self._by_dialect(dialect, status)
        self._by_code = {code: rejected.labels(code) for code in (*CODES, OTHER_CODE)}
        self.keys_changed([])

    def keys_changed(self, names: Iterable[str]) -> None:
        """Create the series of API keys; the series of removed keys stay."""
        for name, status in product((*names, NO_KEY), STATUSES):
            self._by_key(name, status)

    def _find_by_task(self, task: str, status: str) -> tuple[Counter, Counter, Counter]:
        labels = task, status
        return (
            self._requests.labels(*labels),
            self._texts.labels(*labels),
            self._tokens.labels(*labels),
        )

    def _find_by_key(self, name: str, status: str) -> tuple[Counter, Counter]:
        return self._key_requests.labels(name, status), self._key_tokens.labels(name)

    def limit_unchecked(self) -> None:
        """Count one limit that was not checked; see ``LimitObserver``."""
        self._limits_unchecked.inc()

    def request_started(self) -> None:
        """Count one embedding request as in flight."""
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
        dialect: DialectName | None = None,
    ) -> None:
        """Count one embedding request that was answered, rejected or abandoned.

        Args:
            task: its task, or MIXED_TASKS; None if it failed before its task was known.
            status: HTTP status of the answer; 499 if the client disconnected.
            texts: number of its texts.
            tokens: number of tokens that were embedded.
            seconds: from the first byte of the request to the answer.
            stages: the stages that it went through.
            output: format of the vectors; counted only if there is no error.
            code: error code of the answer; None for a success.
            key: name of the API key; None if the request had none.
            dialect: API of its route; None if it is of no dialect.
        """
        self._in_flight.dec()
        name = task or NO_TASK
        label = str(status)
        requests, texts_total, tokens_total = self._by_task(name, label)
        requests.inc()
        texts_total.inc(texts)
        tokens_total.inc(tokens)
        self._seconds_by_task[name].observe(seconds)
        for stage in stages:
            self._by_stage[stage.name].observe(stage.seconds)
        if code is not None:
            self._by_code.get(code, self._by_code[OTHER_CODE]).inc()
        elif output is not None:
            for kind, encoding in output.answers:
                self._by_output(kind.value, encoding.value).inc()
        key_requests, key_tokens = self._by_key(key or NO_KEY, label)
        key_requests.inc()
        key_tokens.inc(tokens)
        if dialect is not None:
            self._by_dialect(dialect, label).inc()
