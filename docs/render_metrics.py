"""Writes docs/metrics.md from the declared series (``make docs``)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from prometheus_client.metrics import MetricWrapperBase

from taskvec.telemetry.metrics import Metrics

ROOT = Path(__file__).parents[1]

INTRODUCTION = """# Metrics

`GET /metrics` is Prometheus' text format.
All series with known label values are there before any traffic, so that a rate sees the first event.
With `--workers` they count for all processes together, whichever answers the scrape; the collectors of Python and of the process, `python_gc_*` and `process_*`, are there only without.
`make docs` writes this page from `docs/render_metrics.py` and `service/taskvec/telemetry/`.

| series | type | labels | question |
|---|---|---|---|
"""

NOTES = """
**Which model?** A server serves one, so its name is a label of `taskvec_build_info` alone, not of every series: a dashboard's variable is `label_values(taskvec_build_info, model)`, and a query joins it by `instance`.

```promql
sum by (model) (rate(taskvec_tokens_total[5m]) * on (instance) group_left (model) taskvec_build_info)
```

**Stages** of a request follow one another: `tokenize`, `cache` (where there is one), `queue` (until its first text enters a forward), `engine` (until its last vector is there), `encode` (cut, normalised, quantised, written).
A request that fails adds those that it went through.
The remote and vllm engines do not see their queues: all of it is `engine`.

**Rejections** count by the code in the answer; [behaviour.md](behaviour.md) lists the codes.
`client_closed` is a client that left, `other` a code that is not listed.

## Alerts

Thresholds are a start: set them by what your clients expect.

| alert | expression | what it means |
|---|---|---|
"""


class Alert(NamedTuple):
    """One row of the table of alerts."""

    name: str
    expression: str
    meaning: str


ALERTS = (
    Alert(
        "engine down",
        "max by (instance) (taskvec_engine_ready) == 0",
        "For a minute: nothing is answered; `/health/ready` says why.",
    ),
    Alert(
        "failing",
        'sum(rate(taskvec_requests_total{status=~"5.."}[5m])) '
        "/ sum(rate(taskvec_requests_total[5m])) > 0.01",
        "More than one request in a hundred fails: `taskvec_rejected_total` has the codes.",
    ),
    Alert(
        "turning away",
        'rate(taskvec_requests_total{status="429"}[5m]) > 0',
        "For ten minutes: more is asked than is embedded; add servers.",
    ),
    Alert(
        "slow",
        "histogram_quantile(0.95, sum by (le) (rate(taskvec_request_seconds_bucket[5m]))) > 2",
        "The slowest twentieth takes over two seconds: `taskvec_stage_seconds` says where.",
    ),
    Alert(
        "stuck queue",
        "taskvec_queue_oldest_seconds > 30",
        "A text has waited for half a minute: the engine hangs or is far behind.",
    ),
    Alert(
        "too few tokenizer threads",
        "min_over_time(taskvec_tokenizer_requests_waiting[5m]) > 0",
        "Requests always wait to be tokenised: raise `TASKVEC_TOKENIZER_THREADS` or `--workers`.",
    ),
    Alert(
        "blocked event loop",
        "histogram_quantile(0.99, sum by (le) "
        "(rate(taskvec_event_loop_lag_seconds_bucket[5m]))) > 0.25",
        "The gateway has more to do than one core gives: raise `--workers`.",
    ),
    Alert(
        "engine server lost",
        "min by (server) (taskvec_engine_server_serving) == 0",
        "For five minutes: a server of the remote engine is not used; the log says why.",
    ),
    Alert(
        "texts cut",
        "increase(taskvec_texts_truncated_total[1h]) > 0",
        "Clients send texts that are too long: what was cut off cannot be found.",
    ),
)


def metrics_page() -> str:
    """docs/metrics.md."""
    registry = Metrics(()).registry
    rows = []
    for family in sorted(registry.collect(), key=lambda family: family.name):
        if family.name.startswith("taskvec_"):
            metric = registry._names_to_collectors[family.name]  # noqa: SLF001 - no public way
            assert isinstance(metric, MetricWrapperBase)  # noqa: S101
            labels = ", ".join(f"`{label}`" for label in metric._labelnames)  # noqa: SLF001
            name = f"{family.name}_total" if family.type == "counter" else family.name
            rows.append(f"| `{name}` | {family.type} | {labels} | {family.documentation} |\n")
    alerts = (
        f"| {alert.name} | `{alert.expression.replace('|', chr(92) + '|')}` | {alert.meaning} |\n"
        for alert in ALERTS
    )
    return INTRODUCTION + "".join(rows) + NOTES + "".join(alerts)


def names_in(expression: str) -> set[str]:
    """The series that a PromQL expression reads."""
    return set(re.findall(r"\btaskvec_\w+", expression))


def pages() -> dict[Path, str]:
    """Every generated file and what it should hold."""
    return {ROOT / "docs" / "metrics.md": metrics_page()}


if __name__ == "__main__":
    for file, content in pages().items():
        file.write_text(content)
        print(f"wrote {file.relative_to(ROOT)}")
