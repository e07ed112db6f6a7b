"""No value of the chart is there for nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from charts import CHART, leaves, template

pytestmark = pytest.mark.full("the Helm chart, rendered by Helm and checked against schemas")


def test_every_value_is_used(tmp_path: Path) -> None:
    """A change of any value changes what is rendered, with one of the ci values at least."""
    chart = tmp_path / "taskvec"
    shutil.copytree(CHART, chart)
    (chart / "files" / "alerts.yaml").write_text("groups: []")
    (chart / "files" / "dashboards").mkdir(exist_ok=True)
    (chart / "files" / "dashboards" / "any.json").write_text("{}")
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    bases = [merged(defaults, ci_values(name)) for name in ORDER]
    bases[0] = merged(bases[0], {"metrics": {"rules": True, "dashboards": {"enabled": True}}})
    before = [rendered(base, chart) for base in bases]
    assert None not in before
    unused = []
    for path in leaves(defaults):
        keys = path.split(".")[1:]
        after = (rendered(changed(base, keys), chart) for base in bases)
        if not any(new not in (old, None) for old, new in zip(before, after, strict=True)):
            unused.append(path)
    assert unused == []


ORDER = ["full", "cpu", "gpu", "keda", "split", "airgapped", "default"]
"""The ci values, those first with which most values matter."""


def ci_values(name: str) -> dict[str, Any]:
    """One of the chart's ci/*-values.yaml."""
    return yaml.safe_load((CHART / "ci" / f"{name}-values.yaml").read_text()) or {}


def merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Values over others, as helm lays them."""
    both = dict(under)
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(under.get(key), dict)
        both[key] = merged(under[key], value) if nested else value
    return both


def changed(values: dict[str, Any], keys: list[str]) -> dict[str, Any]:
    """The values with one of them changed, however little sense it makes."""
    key, *inner = keys
    old = values[key]
    if inner:
        new: Any = changed(old, inner)
    elif isinstance(old, bool):
        new = not old
    elif isinstance(old, int | float):
        new = old + 1
    elif isinstance(old, list):
        new = [*old, "ReadWriteOncePod" if key == "accessModes" else {"name": "CHANGED"}]
    elif isinstance(old, dict):
        new = old | {"TASKVEC_MAX_TEXTS" if key == "config" else "changed": "9"}
    else:
        new = {"mode": "cpu", "monitor": "PodMonitor"}.get(key, f"{old}9")
    return values | {key: new}


def rendered(values: dict[str, Any], chart: Path) -> str | None:
    """The manifests' text, or None where they are refused for a contradiction."""
    done = template(values, chart, "--skip-schema-validation")
    return done.stdout if done.returncode == 0 else None
