"""The chart's values: documented, checked, used, and refused where they contradict each other."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from charts import (
    CASES,
    CHART,
    ROOT,
    case,
    leaves,
    of_kind,
    only,
    refusal,
    render,
    settings,
)
from taskvec import __version__
from taskvec.settings import Settings, environment_variable

pytestmark = pytest.mark.full("the Helm chart, rendered by Helm and checked against schemas")

GENERATOR = runpy.run_path(str(ROOT / "docs" / "render_chart.py"))
PAGES = GENERATOR["pages"]()
VALUES = (CHART / "values.yaml").read_text()

HUB = "jinaai/jina-embeddings-v5-text-small"
KEYS = "[[keys]]"


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.name)
def test_generated_pages_are_up_to_date(file: Path) -> None:
    """README.md, values.schema.json and copies are what `make docs` would write."""
    assert file.read_text() == PAGES[file], "run `make docs`"


def test_every_value_is_described() -> None:
    """Each value of values.yaml, or the mapping that holds it, has a description."""
    described = [f".{'.'.join(value.path)}" for value in GENERATOR["described_values"](VALUES)]
    assert len(described) == len(set(described)) > 100
    for leaf in leaves(yaml.safe_load(VALUES)):
        assert any(f"{leaf}.".startswith(f"{path}.") for path in described), leaf


@pytest.mark.parametrize("values", [
    {"relicas": 2}, {"model": {"nmae": "x"}}, {"engine": {"cache": {"sise": "1Gi"}}},
    {"config": {"TASKVEC_MAX_TEXT": 5}}, {"config": {"LOG_LEVEL": "info"}},
], ids=str)  # fmt: skip
def test_unknown_keys_are_refused(values: dict[str, Any]) -> None:
    """A key that no template reads, and a setting that taskvec does not have, end the install."""
    *_, (key, _) = walk(values)
    assert key in refusal(values)


def walk(values: dict[str, Any]) -> list[tuple[str, Any]]:
    """All keys, outer ones first."""
    found = []
    for key, value in values.items():
        found.append((key, value))
        found += walk(value) if isinstance(value, dict) else []
    return found


@pytest.mark.parametrize("values", [
    {"mode": "tpu"}, {"replicas": -1}, {"drain": {"timeout": 0}}, {"model": {"name": "a'b/c"}},
    {"model": {"name": "owner/x y"}}, {"model": {"name": "small"}},
    {"model": {"name": "$(reboot)/x"}}, {"image": {"digest": "sha256:short"}},
    {"config": {"TASKVEC_MAX_TEXTS": 0}}, {"config": {"TASKVEC_LOG_LEVEL": "loud"}},
    {"config": {"TASKVEC_MEMORY_SHARE": 1.5}}, {"metrics": {"monitor": "Agent"}},
], ids=str)  # fmt: skip
def test_values_that_cannot_be_are_refused(values: dict[str, Any]) -> None:
    """Wrong types, ranges and choices are refused by the schema, those of settings too."""
    *_, (key, _) = walk(values)
    assert key in refusal(values)


def test_settings_that_the_chart_sets_are_no_config() -> None:
    """Every setting is config, a secret, or set by the chart from other values; none is two."""
    config = json.loads((CHART / "values.schema.json").read_text())["properties"]["config"]
    reserved = GENERATOR["SET_BY_CHART"] | GENERATOR["SECRETS"]
    assert reserved <= set(Settings.model_fields)
    assert set(config["properties"]) == {
        environment_variable(name) for name in Settings.model_fields if name not in reserved
    }
    for name in CASES:
        assert set(settings(case(name))) - set(config["properties"]) <= {
            environment_variable(field) for field in reserved
        }


HPA = {"hpa": {"enabled": True}}
KEDA = {"keda": {"enabled": True, "serverAddress": "http://prometheus"}}
CLAIM = {"claim": {"enabled": True}}

CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"auth": {"keys": KEYS, "existingSecret": "a"}}, "auth.keys and auth.existingSecret"),
    ({"config": {"TASKVEC_KEY_CONCURRENCY": 4}}, "config.TASKVEC_KEY_CONCURRENCY"),
    ({"config": {"TASKVEC_LIMITS_URL": "redis://r:1"}}, "config.TASKVEC_LIMITS_URL"),
    ({"model": {"name": HUB, "offline": True}}, "model.cache.claim.existing"),
    ({"model": {"offline": True, "hub": {"endpoint": "https://h"}}}, "model.hub.endpoint"),
    ({"model": {"revision": "main"}}, "model.revision"),
    ({"model": {"cache": CLAIM}}, "maxSurge"),
    ({"model": {"cache": CLAIM}, "strategy": {"rollingUpdate": {"maxSurge": "9%"}}}, "maxSurge"),
    ({"model": {"cache": CLAIM}, "replicas": 2}, "ReadWriteMany"),
    ({"model": {"cache": CLAIM}, "autoscaling": HPA}, "ReadWriteMany"),
    (
        {"mode": "split", "model": {"cache": {"claim": {"existing": "models"}}},
         "engine": {"cache": {"persistent": True}}},
        "engine.cache.persistent",
    ),
    ({"mode": "gpu", "gpu": {"count": 2}}, "gpu.count is 2"),
    ({"mode": "gpu", "config": {"TASKVEC_DATA_PARALLEL": 2}}, "TASKVEC_DATA_PARALLEL is 2"),
    ({"autoscaling": HPA | KEDA}, "autoscaling.keda.enabled"),
    ({"autoscaling": {"minReplicas": 9}}, "autoscaling.minReplicas 9"),
    ({"autoscaling": {"keda": {"enabled": True}}}, "autoscaling.keda.serverAddress"),
    ({"podDisruptionBudget": {"minAvailable": 1}}, "minAvailable and maxUnavailable"),
    ({"podDisruptionBudget": {"maxUnavailable": ""}}, "minAvailable and maxUnavailable"),
    ({"service": {"ipFamilyPolicy": "RequireDualStack"}}, "service.host to ::"),
    ({"ingress": {"enabled": True}}, "ingress.hosts"),
    ({"httpRoute": {"enabled": True}}, "httpRoute.parentRefs"),
    (
        {"metrics": {"monitor": "PodMonitor"}, "auth": {"keys": KEYS},
         "config": {"TASKVEC_METRICS_WITHOUT_KEY": False}},
        "config.TASKVEC_METRICS_WITHOUT_KEY",
    ),
    ({"extraEnv": [{"name": "TASKVEC_PORT", "value": "1"}]}, "extraEnv sets TASKVEC_PORT"),
    ({"extraEnv": [{"name": "TASKVEC_API_KEYS", "value": "a=b"}]}, "sets TASKVEC_API_KEYS"),
    ({"extraEnv": [{"name": "HF_HOME", "value": "/x"}]}, "extraEnv sets HF_HOME"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "named"), CONTRADICTIONS, ids=lambda part: str(part)[:60])
def test_contradictions_are_refused(values: dict[str, Any], named: str) -> None:
    """Values that do not go together end the rendering with a sentence that names them."""
    assert named in refusal(values)


def test_zero_is_a_value() -> None:
    """No replicas, no grace, no budget, no GPU: 0 is what was said, not "unset"."""
    manifests = render({
        "mode": "split", "replicas": 0, "drain": {"grace": 0}, "gpu": {"count": 0},
        "engine": {"replicas": 0, "drain": {"preStop": 0, "timeout": 0}},
        "podDisruptionBudget": {"maxUnavailable": 0},
        "strategy": {"rollingUpdate": {"maxSurge": 0}},
        "config": {"TASKVEC_MAX_QUEUE_TOKENS": 0, "TASKVEC_MEMORY_SHARE": 0},
    })  # fmt: skip
    deployment, stateful = only(manifests, "Deployment"), only(manifests, "StatefulSet")
    assert deployment["spec"]["replicas"] == stateful["spec"]["replicas"] == 0
    assert deployment["spec"]["strategy"]["rollingUpdate"]["maxSurge"] == 0
    assert deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 75
    assert stateful["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 15
    assert "tolerations" not in stateful["spec"]["template"]["spec"]
    for budget in of_kind(manifests, "PodDisruptionBudget"):
        assert budget["spec"]["maxUnavailable"] == 0
    given = settings(manifests)
    names = ("TASKVEC_DRAIN_GRACE", "TASKVEC_MAX_QUEUE_TOKENS", "TASKVEC_MEMORY_SHARE")
    assert [given[name] for name in names] == ["0", "0", "0"]


def test_false_is_a_value() -> None:
    """What defaults to true can be switched off."""
    manifests = render({
        "podDisruptionBudget": {"enabled": False}, "networkPolicy": {"enabled": False},
        "serviceAccount": {"create": False}, "topologySpread": {"enabled": False},
        "config": {"TASKVEC_LOG_REQUESTS": False},
    })  # fmt: skip
    kinds = {manifest["kind"] for manifest in manifests}
    assert not kinds & {"PodDisruptionBudget", "NetworkPolicy", "ServiceAccount"}
    pod = only(manifests, "Deployment")["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == "default"
    assert "topologySpreadConstraints" not in pod
    assert settings(manifests)["TASKVEC_LOG_REQUESTS"] == "false"


def test_large_numbers_keep_their_digits() -> None:
    """Helm reads whole numbers as floats: a body of 32 MiB must not become 3.3554432e+07."""
    manifests = render({
        "config": {"TASKVEC_MAX_BODY_BYTES": 33_554_432, "TASKVEC_VLLM_ARGS": {"max_loras": 8}},
        "autoscaling": {"queueTokens": 12_000_000, "queueSeconds": 2.5} | KEDA,
    })  # fmt: skip
    assert settings(manifests)["TASKVEC_MAX_BODY_BYTES"] == "33554432"
    assert json.loads(settings(manifests)["TASKVEC_VLLM_ARGS"]) == {"max_loras": 8}
    triggers = only(manifests, "ScaledObject")["spec"]["triggers"]
    assert [t["metadata"]["threshold"] for t in triggers] == ["12000000", "2.5"]


def test_rules_and_dashboards_are_the_chart_s_files(tmp_path: Path) -> None:
    """Alerts and dashboards come unchanged from the chart's files, and are missed where not."""
    wanted = {"metrics": {"rules": True, "dashboards": {"enabled": True}}}
    chart = tmp_path / "taskvec"
    shutil.copytree(CHART, chart, ignore=shutil.ignore_patterns("alerts.yaml", "dashboards"))
    assert "files/alerts.yaml" in refusal({"metrics": {"rules": True}}, chart=chart)
    dashboards = {"metrics": {"dashboards": {"enabled": True}}}
    assert "files/dashboards" in refusal(dashboards, chart=chart)
    groups = {"groups": [{"name": "g", "rules": [
        {"alert": "A", "expr": "up == 0", "annotations": {"summary": "{{ $labels.job }} is down"}}
    ]}]}  # fmt: skip
    (chart / "files" / "alerts.yaml").write_text(yaml.safe_dump(groups))
    (chart / "files" / "dashboards").mkdir()
    (chart / "files" / "dashboards" / "one.json").write_text('{"title": "{{task}}"}')
    manifests = render(wanted, chart=chart)
    assert only(manifests, "PrometheusRule")["spec"] == groups
    data = [manifest["data"] for manifest in of_kind(manifests, "ConfigMap")]
    assert {"one.json": '{"title": "{{task}}"}'} in data


def test_the_chart_is_of_this_version() -> None:
    """The images that the chart names by default are those of the package's version."""
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == __version__


def test_recreate_has_no_rolling_update() -> None:
    """The defaults of a rolling update do not stay behind in a strategy that has none."""
    deployment = only(render({"strategy": {"type": "Recreate"}}), "Deployment")
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}
