"""Writes taskvec.json, the Grafana dashboard, from the rows below (``make docs``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).with_name("taskvec.json")
WIDTH = 24
"""Columns of Grafana's grid."""

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
WHERE = 'namespace=~"$namespace", job=~"$job", instance=~"$instance"'
WINDOW = "$__rate_interval"


class Panel(NamedTuple):
    """One panel.

    Attributes:
        title: the question it answers.
        unit: by Grafana's name.
        queries: legend -> PromQL; HERE stands for the chosen targets, [] for the window.
        kind: Grafana's type of panel.
        stack: whether the parts make a whole.
    """

    title: str
    unit: str
    queries: dict[str, str]
    kind: str = "timeseries"
    stack: bool = False


def rate(series: str, by: str, where: str = "") -> str:
    """Events a second, by labels."""
    return f"sum by ({by}) (rate({series}{{{where}HERE}}[]))"


def rate_by(series: str, label: str, where: str = "") -> dict[str, str]:
    """Events a second, one line a value of a label."""
    return {f"{{{{{label}}}}}": rate(series, label, where)}


def total(series: str, where: str = "") -> str:
    """Events a second."""
    return f"sum(rate({series}{{{where}HERE}}[]))"


def quantiles(series: str, **shares: float) -> dict[str, str]:
    """Quantiles of a histogram, named as given."""
    buckets = rate(f"{series}_bucket", "le")
    return {name: f"histogram_quantile({share}, {buckets})" for name, share in shares.items()}


def quantile_by(series: str, label: str, share: float) -> dict[str, str]:
    """A quantile of a histogram, one line a value of a label."""
    buckets = rate(f"{series}_bucket", f"{label}, le")
    return {f"{{{{{label}}}}}": f"histogram_quantile({share}, {buckets})"}


MIDDLE_AND_TAIL = {"p50": 0.5, "p95": 0.95, "p99": 0.99}

ROWS: dict[str, list[Panel]] = {
    "Now": [
        Panel("Replicas that are ready", "none", {"": "sum(taskvec_engine_ready{HERE})"}, "stat"),
        Panel("Requests", "reqps", {"": total("taskvec_requests_total")}, "stat"),
        Panel("Tokens", "cps", {"": total("taskvec_tokens_total")}, "stat"),
        Panel(
            "Requests that fail",
            "percentunit",
            {
                "": total("taskvec_requests_total", 'status=~"5..", ')
                + " / "
                + total("taskvec_requests_total")
            },
            "stat",
        ),
        Panel("Latency, p99", "s", quantiles("taskvec_request_seconds", p99=0.99), "stat"),
        Panel("Oldest text", "s", {"": "max(taskvec_queue_oldest_seconds{HERE})"}, "stat"),
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
        Panel("Requests in work", "none", {"now": "sum(taskvec_requests_in_flight{HERE})"}),
    ],
    "Latency": [
        Panel("Requests", "s", quantiles("taskvec_request_seconds", **MIDDLE_AND_TAIL)),
        Panel("Requests by task, p95", "s", quantile_by("taskvec_request_seconds", "task", 0.95)),
        Panel("Stages, p95", "s", quantile_by("taskvec_stage_seconds", "stage", 0.95)),
        Panel(
            "Where a request's time goes",
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
        Panel("Tokens that wait", "none", {"{{instance}}": "taskvec_queue_tokens{HERE}"}),
        Panel("Texts that wait", "none", {"{{instance}}": "taskvec_queue_texts{HERE}"}),
        Panel("Oldest text", "s", {"{{instance}}": "taskvec_queue_oldest_seconds{HERE}"}),
        Panel("Wait of a request", "s", quantiles("taskvec_queue_seconds", **MIDDLE_AND_TAIL)),
        Panel("Rejections by code", "reqps", rate_by("taskvec_rejected_total", "code")),
        Panel("Texts dropped by reason", "cps", rate_by("taskvec_texts_dropped_total", "reason")),
    ],
    "Batches": [
        Panel("Fill", "percentunit", quantiles("taskvec_batch_fill_ratio", p50=0.5, p95=0.95)),
        Panel(
            "Tokens of a forward",
            "none",
            quantiles("taskvec_batch_tokens", p50=0.5, p95=0.95)
            | {"budget": "max(taskvec_batch_budget_tokens{HERE})"},
        ),
        Panel("Texts of a forward", "none", quantiles("taskvec_batch_texts", p50=0.5, p95=0.95)),
        Panel("Time of a forward", "s", quantiles("taskvec_forward_seconds", **MIDDLE_AND_TAIL)),
        Panel(
            "Forwards that did not fit into memory",
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
            "Engine servers in use",
            "none",
            {"{{server}}": "max by (server) (taskvec_engine_server_serving{HERE})"},
            "state-timeline",
        ),
        Panel("Calls by outcome", "reqps", rate_by("taskvec_engine_calls_total", "outcome")),
        Panel("Calls", "s", quantiles("taskvec_engine_call_seconds", **MIDDLE_AND_TAIL)),
        Panel(
            "Retries and failed lookups",
            "cps",
            {
                "retries": total("taskvec_engine_retries_total"),
                "lookups": total("taskvec_engine_lookup_failures_total"),
            },
        ),
    ],
    "API keys and stores": [
        Panel("Requests by key", "reqps", rate_by("taskvec_key_requests_total", "key")),
        Panel("Tokens by key", "cps", rate_by("taskvec_key_tokens_total", "key")),
        Panel(
            "Turned away by key",
            "reqps",
            rate_by("taskvec_key_requests_total", "key", 'status="429", '),
        ),
        Panel(
            "Texts in the answer cache",
            "percentunit",
            {
                "found": total("taskvec_cache_texts_total", 'outcome="hit", ')
                + " / "
                + total("taskvec_cache_texts_total")
            },
        ),
        Panel("Answer cache", "bytes", {"{{instance}}": "taskvec_cache_bytes{HERE}"}),
        Panel(
            "Stores that do not answer",
            "cps",
            {
                "limits unchecked": total("taskvec_limits_unchecked_total"),
                "cache failures": total("taskvec_cache_failures_total"),
            },
        ),
    ],
    "Process": [
        Panel(
            "Lag of the event loop, p99",
            "s",
            quantile_by("taskvec_event_loop_lag_seconds", "instance", 0.99),
        ),
        Panel(
            "Tokenizer",
            "none",
            {
                "threads at work": "sum(taskvec_tokenizer_threads_busy{HERE})",
                "requests that wait": "sum(taskvec_tokenizer_requests_waiting{HERE})",
            },
        ),
        Panel("Texts cut", "cps", {"texts": total("taskvec_texts_truncated_total")}),
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
    """What Grafana imports."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        panels.append(_placed({"type": "row", "title": title, "collapsed": False}, 0, y, WIDTH, 1))
        y += 1
        height, across = (4, 6) if row[0].kind == "stat" else (8, 3)
        width = WIDTH // across
        for number, panel in enumerate(row):
            line, column = divmod(number, across)
            panels.append(_placed(_panel(panel), column * width, y + line * height, width, height))
        y += -(-len(row) // across) * height
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


def _placed(panel: dict[str, Any], x: int, y: int, width: int, height: int) -> dict[str, Any]:
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
    """The data source, and which replicas are shown; each choice narrows those after it."""
    variables: list[dict[str, Any]] = [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    ]
    chosen = ""
    for name in ("namespace", "job", "instance"):
        variables.append(
            {
                "name": name,
                "type": "query",
                "datasource": DATASOURCE,
                "query": f"label_values(taskvec_build_info{{{chosen}}}, {name})",
                "refresh": 2,
                "multi": True,
                "includeAll": True,
                "allValue": ".*",  # also where a target has no such label
                "current": {"text": "All", "value": "$__all"},
            }
        )
        chosen += f'{", " if chosen else ""}{name}=~"${name}"'
    return variables


def pages() -> dict[Path, str]:
    """Every generated file and what it should hold."""
    return {FILE: json.dumps(dashboard(), indent=2) + "\n"}


if __name__ == "__main__":
    for file, content in pages().items():
        file.write_text(content)
        print(f"wrote {file.name}")
