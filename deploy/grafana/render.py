"""Write taskvec.json, the Grafana dashboard, from the rows below (``make docs``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).with_name("taskvec.json")
WIDTH = 24
"""Number of columns of Grafana's grid."""

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
WHERE = 'namespace=~"$namespace", job=~"$job", instance=~"$instance"'
WINDOW = "$__rate_interval"


class Panel(NamedTuple):
    """One panel.

    Attributes:
        title: shown above the panel.
        unit: Grafana's name of the unit.
        queries: legend -> PromQL; HERE stands for the selected targets, [] for the rate window.
        kind: Grafana's panel type.
        stack: True stacks the series.
    """

    title: str
    unit: str
    queries: dict[str, str]
    kind: str = "timeseries"
    stack: bool = False


def rate(series: str, by: str, where: str = "") -> str:
    """Return PromQL for events a second, by labels."""
    return f"sum by ({by}) (rate({series}{{{where}HERE}}[]))"


def rate_by(series: str, label: str, where: str = "") -> dict[str, str]:
    """Return a query for events a second, with a line for each value of a label."""
    return {f"{{{{{label}}}}}": rate(series, label, where)}


def total(series: str, where: str = "") -> str:
    """Return PromQL for events a second, in total."""
    return f"sum(rate({series}{{{where}HERE}}[]))"


def quantiles(series: str, **levels: float) -> dict[str, str]:
    """Return queries for quantiles of a histogram: legend=quantile."""
    buckets = rate(f"{series}_bucket", "le")
    return {name: f"histogram_quantile({share}, {buckets})" for name, share in levels.items()}


def quantile_by(series: str, label: str, share: float) -> dict[str, str]:
    """Return a query for one quantile of a histogram, with a line for each value of a label."""
    buckets = rate(f"{series}_bucket", f"{label}, le")
    return {f"{{{{{label}}}}}": f"histogram_quantile({share}, {buckets})"}


PERCENTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}

ROWS: dict[str, list[Panel]] = {
    "Overview": [
        Panel("Ready replicas", "none", {"": "sum(taskvec_engine_ready{HERE})"}, "stat"),
        Panel("Requests", "reqps", {"": total("taskvec_requests_total")}, "stat"),
        Panel("Tokens", "cps", {"": total("taskvec_tokens_total")}, "stat"),
        Panel(
            "Failed requests",
            "percentunit",
            {
                "": total("taskvec_requests_total", 'status=~"5..", ')
                + " / "
                + total("taskvec_requests_total")
            },
            "stat",
        ),
        Panel("Latency, p99", "s", quantiles("taskvec_request_seconds", p99=0.99), "stat"),
        Panel("Oldest queued text", "s", {"": "max(taskvec_queue_oldest_seconds{HERE})"}, "stat"),
    ],
    "Traffic": [
        Panel("Requests by task", "reqps", rate_by("taskvec_requests_total", "task")),
        Panel("Texts by task", "cps", rate_by("taskvec_texts_total", "task")),
        Panel("Tokens by task", "cps", rate_by("taskvec_tokens_total", "task")),
        Panel("Requests by status", "reqps", rate_by("taskvec_requests_total", "status")),
        Panel(
            "Vectors by type and transport",
            "reqps",
            {"{{output}}, {{transport}}": rate("taskvec_answers_total", "output, transport")},
        ),
        Panel("Requests in flight", "none", {"now": "sum(taskvec_requests_in_flight{HERE})"}),
    ],
    "Latency": [
        Panel("Requests", "s", quantiles("taskvec_request_seconds", **PERCENTILES)),
        Panel("Requests by task, p95", "s", quantile_by("taskvec_request_seconds", "task", 0.95)),
        Panel("Stages, p95", "s", quantile_by("taskvec_stage_seconds", "stage", 0.95)),
        Panel(
            "Mean time of a request by stage",
            "s",
            {
                "{{stage}}": rate("taskvec_stage_seconds_sum", "stage")
                + " / ignoring (stage) group_left () "
                + total("taskvec_request_seconds_count")
            },
            stack=True,
        ),
    ],
    "Queue": [
        Panel("Queued tokens", "none", {"{{instance}}": "taskvec_queue_tokens{HERE}"}),
        Panel("Queued texts", "none", {"{{instance}}": "taskvec_queue_texts{HERE}"}),
        Panel("Oldest queued text", "s", {"{{instance}}": "taskvec_queue_oldest_seconds{HERE}"}),
        Panel("Time in the queue", "s", quantiles("taskvec_queue_seconds", **PERCENTILES)),
        Panel("Rejections by code", "reqps", rate_by("taskvec_rejected_total", "code")),
        Panel("Texts dropped by reason", "cps", rate_by("taskvec_texts_dropped_total", "reason")),
    ],
    "Batches": [
        Panel(
            "Batch fill ratio",
            "percentunit",
            quantiles("taskvec_batch_fill_ratio", p50=0.5, p95=0.95),
        ),
        Panel(
            "Tokens of a batch",
            "none",
            quantiles("taskvec_batch_tokens", p50=0.5, p95=0.95)
            | {"budget": "max(taskvec_batch_budget_tokens{HERE})"},
        ),
        Panel("Texts of a batch", "none", quantiles("taskvec_batch_texts", p50=0.5, p95=0.95)),
        Panel("Forward pass duration", "s", quantiles("taskvec_forward_seconds", **PERCENTILES)),
        Panel(
            "Forward passes out of memory",
            "cps",
            rate_by("taskvec_out_of_memory_total", "instance"),
        ),
    ],
    "Engine": [
        Panel(
            "State",
            "none",
            {"{{instance}}: {{state}}": "taskvec_engine_state{HERE} == 1"},
            "state-timeline",
        ),
        Panel(
            "Engine servers",
            "none",
            {"{{server}}": "max by (server) (taskvec_engine_server_serving{HERE})"},
            "state-timeline",
        ),
        Panel(
            "Calls to engine servers by outcome",
            "reqps",
            rate_by("taskvec_engine_calls_total", "outcome"),
        ),
        Panel(
            "Calls to engine servers", "s", quantiles("taskvec_engine_call_seconds", **PERCENTILES)
        ),
        Panel(
            "Retries and failed DNS lookups",
            "cps",
            {
                "retries": total("taskvec_engine_retries_total"),
                "lookups": total("taskvec_engine_lookup_failures_total"),
            },
        ),
    ],
    "API keys, cache and Redis": [
        Panel("Requests by key", "reqps", rate_by("taskvec_key_requests_total", "key")),
        Panel("Tokens by key", "cps", rate_by("taskvec_key_tokens_total", "key")),
        Panel(
            "Requests rejected with 429, by key",
            "reqps",
            rate_by("taskvec_key_requests_total", "key", 'status="429", '),
        ),
        Panel(
            "Hit ratio of the answer cache",
            "percentunit",
            {
                "hits": total("taskvec_cache_texts_total", 'outcome="hit", ')
                + " / "
                + total("taskvec_cache_texts_total")
            },
        ),
        Panel("Size of the answer cache", "bytes", {"{{instance}}": "taskvec_cache_bytes{HERE}"}),
        Panel(
            "Redis failures",
            "cps",
            {
                "limits unchecked": total("taskvec_limits_unchecked_total"),
                "cache failures": total("taskvec_cache_failures_total"),
            },
        ),
    ],
    "Process": [
        Panel(
            "Event-loop lag, p99",
            "s",
            quantile_by("taskvec_event_loop_lag_seconds", "instance", 0.99),
        ),
        Panel(
            "Longest pauses of a minute",
            "s",
            {
                "event loop": "max(taskvec_event_loop_longest_turn_seconds{HERE})",
                "interpreter lock": "max(taskvec_interpreter_lock_longest_hold_seconds{HERE})",
                "event loop, engine's process": (
                    "max(taskvec_engine_process_event_loop_longest_turn_seconds{HERE})"
                ),
                "interpreter lock, engine's process": (
                    "max(taskvec_engine_process_interpreter_lock_longest_hold_seconds{HERE})"
                ),
            },
        ),
        Panel(
            "Memory",
            "bytes",
            {
                "limit": "max(taskvec_memory_limit_bytes{HERE})",
                "used": "max(taskvec_memory_used_bytes{HERE})",
                "budget of requests": "max(taskvec_memory_budget_bytes{HERE})",
                "held by requests": "max(taskvec_memory_held_bytes{HERE})",
            },
        ),
        Panel(
            "Tokenizer",
            "none",
            {
                "busy threads": "sum(taskvec_tokenizer_threads_busy{HERE})",
                "waiting requests": "sum(taskvec_tokenizer_requests_waiting{HERE})",
            },
        ),
        Panel("Truncated texts", "cps", {"texts": total("taskvec_texts_truncated_total")}),
        Panel(
            "Versions",
            "none",
            {
                "{{version}} {{model}} {{engine}}": "sum by (version, model, engine) "
                "(taskvec_build_info{HERE})"
            },
        ),
    ],
}


def dashboard() -> dict[str, Any]:
    """Return the dashboard as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        panels.append(
            _with_position({"type": "row", "title": title, "collapsed": False}, 0, y, WIDTH, 1)
        )
        y += 1
        height, columns = (4, 6) if row[0].kind == "stat" else (8, 3)
        width = WIDTH // columns
        for number, panel in enumerate(row):
            line, column = divmod(number, columns)
            panels.append(
                _with_position(_panel(panel), column * width, y + line * height, width, height)
            )
        y += -(-len(row) // columns) * height
    for number, panel in enumerate(panels, 1):
        panel["id"] = number
    return {
        "uid": "taskvec",
        "title": "taskvec",
        "tags": ["taskvec", "embeddings"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": _variables()},
        "panels": panels,
    }


def _with_position(
    panel: dict[str, Any], x: int, y: int, width: int, height: int
) -> dict[str, Any]:
    return panel | {"gridPos": {"x": x, "y": y, "w": width, "h": height}}


def _panel(panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.kind == "timeseries":
        defaults["custom"] = {
            "fillOpacity": 10,
            "showPoints": "never",
            "stacking": {"mode": "normal" if panel.stack else "none"},
        }
    targets = [
        {
            "refId": chr(ord("A") + number),
            "datasource": DATASOURCE,
            "expr": query.replace("HERE", WHERE).replace("[]", f"[{WINDOW}]"),
            "legendFormat": legend,
        }
        for number, (legend, query) in enumerate(panel.queries.items())
    ]
    return {
        "type": panel.kind,
        "title": panel.title,
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "targets": targets,
    }


def _variables() -> list[dict[str, Any]]:
    """Return the variables; each one is filtered by the ones before it."""
    variables: list[dict[str, Any]] = [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    ]
    filters = ""
    for name in ("namespace", "job", "instance"):
        variables.append(
            {
                "name": name,
                "type": "query",
                "datasource": DATASOURCE,
                "query": f"label_values(taskvec_build_info{{{filters}}}, {name})",
                "refresh": 2,
                "multi": True,
                "includeAll": True,
                "allValue": ".*",  # also matches targets without this label
                "current": {"text": "All", "value": "$__all"},
            }
        )
        filters += f'{", " if filters else ""}{name}=~"${name}"'
    return variables


def pages() -> dict[Path, str]:
    """Return each generated file and its content."""
    return {FILE: json.dumps(dashboard(), indent=2) + "\n"}


if __name__ == "__main__":
    for file, content in pages().items():
        file.write_text(content)
        print(f"wrote {file.name}")
