"""Write docs/metrics.md from the declared metrics (``make docs``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from prometheus_client.metrics import MetricWrapperBase

from taskvec.metrics.service import Metrics

ROOT = Path(__file__).parents[1]

INTRODUCTION = """# Metrics

`GET /metrics` returns metrics in Prometheus' text format.
All series whose label values are known exist before the first request, so that `rate()` includes the first event.
With `--workers` they are summed over all processes, whichever process answers the scrape; Python's and the process's own metrics, `python_gc_*` and `process_*`, exist only without `--workers`.
`make docs` writes this page from `docs/render_metrics.py` and `service/taskvec/metrics/`.

| series | type | labels | question |
|---|---|---|---|
"""

NOTES = """
**Model name.** A server serves one model, so only `taskvec_build_info` has the label `model`; a dashboard's variable is `label_values(taskvec_build_info, model)`, and a query joins it by `instance`.

```promql
sum by (model) (rate(taskvec_tokens_total[5m]) * on (instance) group_left (model) taskvec_build_info)
```

**Stages** of a request follow one another: `tokenize`, `cache` (if there is a cache), `queue` (until the first text enters a forward pass), `engine` (until the last vector is available), `encode` (truncate, normalise, quantise, write).
A request that fails adds the stages that it reached.
The remote and vllm engines do not report queue times: the whole time is `engine`.

**Queue metrics**, `taskvec_queue_*`, are the metrics for autoscaling.
With the packed engine, they count texts that are not yet in a forward pass.
vLLM and the servers of a gateway do not report when a text enters a forward pass, so there the metrics count all texts that are admitted and not yet answered: they are above 0 under any load, and grow with the waiting time.
A gateway counts the texts that it has sent and those that wait in it: the sum over gateways, divided by the number of servers, is the load of a server.
With `--workers`, the engine process reports for all; gateways in front of other servers are summed.

**Rejections** are counted by the error code of the response; [behaviour.md](behaviour.md) lists the codes.
`client_closed` is a client that disconnected, `other` an unknown code.

## Dashboard

[deploy/grafana/taskvec.json](../deploy/grafana/taskvec.json) is a Grafana dashboard of these metrics: import it, or mount it as [compose](../deploy/compose.yaml) does.
`make docs` writes it from `deploy/grafana/render.py`.

## Alerts

The rules are in [deploy/alerts/taskvec.yaml](../deploy/alerts/taskvec.yaml), a rule file for Prometheus; `deploy/alerts/tests.yaml` has, for each alert, a case in which it fires and one in which it does not.
They define two objectives: 999 of 1,000 requests do not fail, and 99 of 100 take at most 2.5 seconds.
Adjust the thresholds to your clients' expectations.
The annotation `runbook_url` of an alert is the path of its runbook in this repository: prefix it with the address of your copy.
A *critical* alert should page someone, a *warning* is for working hours, *info* is for a dashboard.

| alert | severity | condition | for | meaning |
|---|---|---|---|---|
"""

RECORDED = """
The same file records `job:taskvec_requests_failed:ratio_rate1h` and similar series: the share of requests that failed, or took more than 2.5 seconds, over five minutes to three days.
"""


def metrics_page() -> str:
    """Return the content of docs/metrics.md."""
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
    """Return the content of each generated file."""
    return {ROOT / "docs" / "metrics.md": metrics_page()}


if __name__ == "__main__":
    for file, content in pages().items():
        file.write_text(content)
        print(f"wrote {file.relative_to(ROOT)}")
