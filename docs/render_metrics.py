"""Write docs/metrics.md from the declared metrics (``make docs``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from prometheus_client.metrics import MetricWrapperBase

from taskvec.metrics.registry import Metrics

ROOT = Path(__file__).parents[1]

INTRODUCTION = """# Metrics

`GET /metrics` is Prometheus' text format.
All series with known label values exist before the first request, so that a rate sees the first event.
With `--workers`, they are summed over all processes, whichever process answers the scrape.
Python's own collectors, `python_gc_*` and `process_*`, exist only without `--workers`, and are those of the gateway; `taskvec_engine_process_resident_bytes` is the memory of the engine's process.
`make docs` writes this page from `docs/render_metrics.py` and `service/taskvec/metrics/`.

| series | type | labels | question |
|---|---|---|---|
"""

NOTES = """
**Model.** A server serves one model, so its name is a label of `taskvec_build_info` alone, not of every series.
A dashboard variable is `label_values(taskvec_build_info, model)`, and a query joins the label by `instance`:

```promql
sum by (model) (rate(taskvec_tokens_total[5m]) * on (instance) group_left (model) taskvec_build_info)
```

**Stages.** A request passes these stages in order:

| stage | ends when |
|---|---|
| `tokenize` | all its texts are tokenised |
| `cache` | its texts were looked up (only if the answer cache is enabled) |
| `queue` | its first text enters a forward pass |
| `engine` | its last vector is computed |
| `encode` | the vectors are truncated, normalised, quantised and written as JSON or bytes |

A request that fails adds the stages that it reached.
The remote and vllm engines do not see their queues: the whole time counts as `engine`.

**Queue.** An autoscaler should follow `taskvec_queue_*`.
With the packed engine, the queue is what has not entered a forward pass.
The vllm engine and remote engine servers do not report when a text enters a forward pass.
With them, the queue is everything that was admitted and not answered: these series are above 0 under any load, and grow with the waiting time.
A gateway counts what it has sent and what it has not sent yet: the sum over gateways, divided by the number of servers, is the load of one server.
With `--workers`, the engine's process reports for all; gateways before remote servers are summed.

**Rejections** are counted by the error code in the answer; [behaviour.md](behaviour.md) lists the codes.
`client_closed` is a client that disconnected, `other` a code that is not in the list.

## Dashboard

[deploy/grafana/taskvec.json](../deploy/grafana/taskvec.json) is a Grafana dashboard of these series: import it, or mount it as [compose](../docker-compose.yml) does.
`make docs` writes it from `deploy/grafana/render.py`.

## Alerts

The rules are [deploy/alerts/taskvec.yaml](../deploy/alerts/taskvec.yaml), a plain rule file for Prometheus; `deploy/alerts/tests.yaml` has a case for and against each.
They watch two objectives: 999 of 1,000 requests succeed, and 99 of 100 take at most 2.5 seconds.
Adjust the thresholds to what your clients expect.
Each alert has a runbook; its annotation `runbook_url` is a path in this repository, to be prefixed with the address of your copy.
A *critical* alert pages somebody, a *warning* can wait for working hours, an *info* is for a dashboard.

| alert | severity | fires when | for | what it means |
|---|---|---|---|---|
"""

RECORDED = """
The same file records `job:taskvec_requests_failed:ratio_rate1h` and similar series: the share of requests that failed, or took over 2.5 seconds, over windows from five minutes to three days.
"""


def metrics_page() -> str:
    """Return the content of docs/metrics.md."""
    registry = Metrics(()).registry
    rows = []
    for family in sorted(registry.collect(), key=lambda family: family.name):
        if family.name.startswith("taskvec_"):
            metric = registry._names_to_collectors[family.name]  # noqa: SLF001 - no public lookup by name
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
    """Return each generated file and its content."""
    return {ROOT / "docs" / "metrics.md": metrics_page()}


if __name__ == "__main__":
    for file, content in pages().items():
        file.write_text(content)
        print(f"wrote {file.relative_to(ROOT)}")
