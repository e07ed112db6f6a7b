"""Writes docs/metrics.md from the declared series (``make docs``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from prometheus_client.metrics import MetricWrapperBase

from taskvec.metrics.service import Metrics

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

**What waits**, `taskvec_queue_*`, is what a scaler should follow.
With the packed engine, it is what is in no forward yet.
The vllm engine and a gateway's servers do not tell when a text enters a forward, so there it is all that was admitted and is not answered: those series are above 0 under any load, and grow with the wait.
A gateway counts what it has sent and what waits in it for a turn: the sum over gateways, divided by the number of servers, is the load of a server.
With `--workers`, the process of the engine counts for all; gateways before other servers count together.

**Rejections** count by the code in the answer; [behaviour.md](behaviour.md) lists the codes.
`client_closed` is a client that left, `other` a code that is not listed.

## Dashboard

[deploy/grafana/taskvec.json](../deploy/grafana/taskvec.json) is a Grafana dashboard of these series: import it, or mount it as [compose](../deploy/compose.yaml) does.
`make docs` writes it from `deploy/grafana/render.py`.

## Alerts

The rules are [deploy/alerts/taskvec.yaml](../deploy/alerts/taskvec.yaml), a plain rule file for Prometheus; `deploy/alerts/tests.yaml` has a case for and against each.
They hold two objectives: 999 of 1,000 requests do not fail, and 99 of 100 take at most 2.5 seconds.
Thresholds are a start: set them by what your clients expect.
Each alert has a runbook, named by its annotation `runbook_url` as a path in this repository: put the address of your copy before it.
A *critical* alert wakes somebody, a *warning* is for working hours, *info* for a dashboard.

| alert | severity | fires when | for | what it means |
|---|---|---|---|---|
"""

RECORDED = """
`job:taskvec_requests_failed:ratio_rate1h` and its like are recorded by the same file: the share of requests that failed, or took over 2.5 seconds, in five minutes to three days.
"""


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
    rules = yaml.safe_load((ROOT / "deploy" / "alerts" / "taskvec.yaml").read_text())
    alerts = [
        _alert_row(rule) for group in rules["groups"] for rule in group["rules"] if "alert" in rule
    ]
    return INTRODUCTION + "".join(rows) + NOTES + "".join(alerts) + RECORDED


def _alert_row(rule: dict[str, Any]) -> str:
    name, notes = rule["alert"], rule["annotations"]
    page = notes["runbook_url"].removeprefix("docs/")
    expression = rule["expr"].replace("|", "\\|")
    return (
        f"| [{name}]({page}) | {rule['labels']['severity']} | `{expression}` "
        f"| {rule.get('for', '')} | {notes['summary']} |\n"
    )


def pages() -> dict[Path, str]:
    """Every generated file and what it should hold."""
    return {ROOT / "docs" / "metrics.md": metrics_page()}


if __name__ == "__main__":
    for file, content in pages().items():
        file.write_text(content)
        print(f"wrote {file.relative_to(ROOT)}")
