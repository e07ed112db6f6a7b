"""Metrics: series exist from the start, and count what happened."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

import taskvec
from taskvec.core.output_format import Encoding, OutputFormat, OutputType
from taskvec.engines.base import DropReason, EngineObserver, EngineState
from taskvec.errors import CODES
from taskvec.metrics.registry import Metrics
from taskvec.metrics.requests import NO_TASK, OTHER_CODE, STATUSES
from taskvec.telemetry.stages import STAGES

TASKS = ("retrieval.query", "clustering")


@pytest.fixture
def metrics() -> Metrics:
    """Return the metrics of a service with two tasks."""
    return Metrics(TASKS)


def test_every_label_is_there_before_traffic(metrics: Metrics) -> None:
    """Each known label value has a series of 0 at once, so that a rate sees the first request."""
    seen = samples(metrics)
    for task in (*TASKS, NO_TASK):
        for status in STATUSES:
            labels = {"task": task, "status": status}
            for series in ("requests", "texts", "tokens"):
                assert seen[key(f"taskvec_{series}_total", **labels)] == 0
        assert seen[key("taskvec_request_seconds_count", task=task)] == 0
    for reason in DropReason:
        assert seen[key("taskvec_texts_dropped_total", reason=reason)] == 0
    for stage in STAGES:
        assert seen[key("taskvec_stage_seconds_count", stage=stage)] == 0
    for code in (*CODES, OTHER_CODE):
        assert seen[key("taskvec_rejected_total", code=code)] == 0
    for output in OutputType:
        assert seen[key("taskvec_answers_total", output=output.value, transport="raw")] == 0
    for gauge in ("requests_in_flight", "queue_texts", "queue_tokens", "engine_ready"):
        assert seen[key(f"taskvec_{gauge}")] == 0


def test_every_help_text_is_a_question(metrics: Metrics) -> None:
    """The help text of every metric is the question that it answers."""
    families = list(text_string_to_metric_families(metrics.render("ready").decode()))
    helps = {
        family.name: family.documentation
        for family in families
        if family.name.startswith("taskvec_") and not family.name.endswith("_created")
    }
    assert len(helps) >= 13
    assert [name for name, text in helps.items() if not text.endswith("?")] == []


def test_an_ended_request_is_counted(metrics: Metrics) -> None:
    """A request counts itself, its texts, tokens and seconds under its task and status."""
    metrics.request_started()
    metrics.request_ended("clustering", 200, texts=3, tokens=40, seconds=0.2)
    seen = samples(metrics)
    labels = {"task": "clustering", "status": "200"}
    assert seen[key("taskvec_requests_total", **labels)] == 1
    assert seen[key("taskvec_texts_total", **labels)] == 3
    assert seen[key("taskvec_tokens_total", **labels)] == 40
    assert seen[key("taskvec_request_seconds_sum", task="clustering")] == pytest.approx(0.2)
    assert seen[key("taskvec_request_seconds_bucket", task="clustering", le="0.1")] == 0
    assert seen[key("taskvec_request_seconds_bucket", task="clustering", le="0.25")] == 1
    others = {"task": "retrieval.query", "status": "200"}
    assert seen[key("taskvec_requests_total", **others)] == 0


def test_requests_in_flight_go_up_and_down(metrics: Metrics) -> None:
    """The gauge counts requests that have started and not ended, whatever their status."""
    for _ in range(3):
        metrics.request_started()
    metrics.request_ended("clustering", 499, texts=1, tokens=0, seconds=0.1)
    metrics.request_ended(None, 400, texts=0, tokens=0, seconds=0.1)
    assert samples(metrics)[key("taskvec_requests_in_flight")] == 1


def test_a_request_without_a_task_has_a_label_of_its_own(metrics: Metrics) -> None:
    """A request that fails before its task is known counts as task "none"."""
    metrics.request_started()
    metrics.request_ended(None, 400, texts=0, tokens=0, seconds=0.01)
    seen = samples(metrics)
    assert seen[key("taskvec_requests_total", task=NO_TASK, status="400")] == 1
    assert seen[key("taskvec_request_seconds_count", task=NO_TASK)] == 1


def test_an_unlisted_status_is_counted(metrics: Metrics) -> None:
    """A status outside the list gets its series when it first occurs."""
    unlisted = "418"
    assert unlisted not in STATUSES
    for _ in range(2):
        metrics.request_started()
        metrics.request_ended("clustering", int(unlisted), texts=1, tokens=2, seconds=0.01)
    seen = samples(metrics)
    assert seen[key("taskvec_requests_total", task="clustering", status=unlisted)] == 2
    assert seen[key("taskvec_tokens_total", task="clustering", status=unlisted)] == 4


def test_an_empty_queue_has_no_age(metrics: Metrics) -> None:
    """The age of the oldest text grows with time, and is 0 if the queue is empty."""
    metrics.queue_changed(1, 10, time.monotonic() - 1)
    first = samples(metrics)[key("taskvec_queue_oldest_seconds")]
    time.sleep(0.02)
    assert samples(metrics)[key("taskvec_queue_oldest_seconds")] >= first + 0.02
    metrics.queue_changed(0, 0, None)
    assert samples(metrics)[key("taskvec_queue_oldest_seconds")] == 0


def test_a_rejection_counts_by_its_code(metrics: Metrics) -> None:
    """Rejections count under their code, or "other" if it is unlisted, and not as answers."""
    for code in ("input_too_long", "input_too_long", "made_up"):
        metrics.request_started()
        output = OutputFormat(8, encoding=Encoding.BASE64)
        metrics.request_ended(
            None, 400, texts=0, tokens=0, seconds=0.1, code=code, output=output, stages=[]
        )
    seen = samples(metrics)
    assert seen[key("taskvec_rejected_total", code="input_too_long")] == 2
    assert seen[key("taskvec_rejected_total", code=OTHER_CODE)] == 1
    assert seen[key("taskvec_answers_total", output="float", transport="base64")] == 0


def test_every_code_is_listed() -> None:
    """Each error code that the source raises, literal or made from a field name, is in CODES."""
    folder = Path(taskvec.__file__).parent
    sources = "".join(file.read_text() for file in folder.rglob("*.py"))
    raised = set(re.findall(r'\bcode="(\w+)"', sources))
    calls = re.findall(r'fields\.string\([^,]+, "(\w+)"\)', sources)
    flags = re.findall(r"fields\.agreed(?:_as)?\(body, (\w+), fields\.boolean\)", sources)
    spellings = [re.findall(rf"^{name} = \(([^)]*)\)", sources, re.MULTILINE) for name in flags]
    fields = calls + re.findall(r"\w+", " ".join(found for (found,) in spellings))
    assert len(raised) > 15
    assert {"task", "truncation", "truncate", "normalized", "normalize"} <= set(fields)
    assert raised | {f"invalid_{field}" for field in fields} <= set(CODES)
    assert len(set(CODES)) == len(CODES)


def test_the_engine_state_is_one_of_several(metrics: Metrics) -> None:
    """Exactly one state is 1, and only `ready` sets the ready gauge."""
    for state in (state.value for state in EngineState):
        page = metrics.render(state).decode()
        ones = re.findall(r'\ntaskvec_engine_state\{state="(\w+)"\} 1\.0', page)
        assert ones == [state]
        assert f"\ntaskvec_engine_ready {1.0 if state == 'ready' else 0.0}\n" in page


def test_the_build_is_described(metrics: Metrics) -> None:
    """Version, model and engine are labels of one series with the value 1."""
    metrics.describe(version="1.2", model="m/n", engine="packed")
    labels = {"version": "1.2", "model": "m/n", "engine": "packed"}
    assert samples(metrics)[key("taskvec_build_info", **labels)] == 1


def test_the_engine_reports_its_queue(metrics: Metrics) -> None:
    """queue_changed sets the gauges to the present queue."""
    observer: EngineObserver = metrics
    observer.queue_changed(7, 900, time.monotonic())
    observer.queue_changed(2, 30, time.monotonic() - 5)
    seen = samples(metrics)
    assert seen[key("taskvec_queue_oldest_seconds")] == pytest.approx(5, abs=1)
    assert seen[key("taskvec_queue_texts")] == 2
    assert seen[key("taskvec_queue_tokens")] == 30


def test_the_engine_reports_its_batches(metrics: Metrics) -> None:
    """A forward pass is observed with its texts, tokens and seconds, a wait once a request."""
    observer: EngineObserver = metrics
    observer.batch_started([0.01, 0.02, 3.0])
    observer.batch_finished(5, 600, 0.04, budget=800)
    observer.batch_finished(1, 20, 0.01, budget=800)
    seen = samples(metrics)
    assert seen[key("taskvec_queue_seconds_count")] == 3
    assert seen[key("taskvec_queue_seconds_sum")] == pytest.approx(3.03)
    assert seen[key("taskvec_batch_texts_sum")] == 6
    assert seen[key("taskvec_batch_tokens_sum")] == 620
    assert seen[key("taskvec_batch_tokens_bucket", le="64.0")] == 1
    assert seen[key("taskvec_batch_fill_ratio_sum")] == pytest.approx(0.775)
    assert seen[key("taskvec_batch_fill_ratio_bucket", le="0.05")] == 1
    assert seen[key("taskvec_batch_fill_ratio_bucket", le="0.75")] == 2
    assert seen[key("taskvec_forward_seconds_count")] == 2
    assert seen[key("taskvec_forward_seconds_sum")] == pytest.approx(0.05)


@pytest.mark.parametrize("reason", DropReason)
def test_the_engine_reports_what_it_dropped(metrics: Metrics, reason: str) -> None:
    """Dropped texts are counted under their reason only."""
    observer: EngineObserver = metrics
    observer.texts_dropped(reason, 11)
    observer.texts_dropped(reason, 4)
    seen = samples(metrics)
    counts = {name: seen[key("taskvec_texts_dropped_total", reason=name)] for name in DropReason}
    assert counts == dict.fromkeys(DropReason, 0) | {reason: 15}


def test_two_services_do_not_share_metrics(metrics: Metrics) -> None:
    """Each service has its own registry, so two in one process do not conflict or mix."""
    metrics.texts_dropped("failed", 5)
    other = samples(Metrics(TASKS))
    assert other[key("taskvec_texts_dropped_total", reason="failed")] == 0


def samples(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return every sample of a scrape, by name and labels."""
    families = text_string_to_metric_families(metrics.render("starting").decode())
    return {
        key(sample.name, **sample.labels): sample.value
        for family in families
        for sample in family.samples
    }


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    """Return the key of a sample in ``samples``."""
    return name, frozenset(labels.items())
