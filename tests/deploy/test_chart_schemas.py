"""What helm, Kubernetes, the custom resources' makers and checkov say of the chart."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from charts import CASES, CHART, TOOLS, case, helm
from programs import node

pytestmark = pytest.mark.full("the Helm chart, rendered by Helm and checked against schemas")

CUSTOM = {
    "ServiceMonitor": "prometheus-operator/monitoring.coreos.com/v1/ServiceMonitor",
    "PodMonitor": "prometheus-operator/monitoring.coreos.com/v1/PodMonitor",
    "PrometheusRule": "prometheus-operator/monitoring.coreos.com/v1/PrometheusRule",
    "ScaledObject": "keda/keda.sh/v1alpha1/ScaledObject",
    "HTTPRoute": "gateway-api/gateway.networking.k8s.io/v1/HTTPRoute",
}
"""Kinds that are no part of Kubernetes, and the module that has their type."""

SKIPPED = {
    "CKV_K8S_11": "no limit on processor time: an engine may use a node's idle cores",
    "CKV_K8S_15": "pullPolicy IfNotPresent: tags are of versions, and air-gapped nodes cannot ask",
    "CKV_K8S_35": "the engine's key and the hub's token are read from variables alone",
    "CKV_K8S_43": "image.digest is the operator's to give: a chart cannot know it",
}
"""checkov's checks that do not hold, each with the reason."""

SKIPPED_FOR_TEST_POD = {
    "CKV_K8S_8": "it ends by itself: nothing to keep alive",
    "CKV_K8S_9": "it answers nobody: nothing to be ready for",
    "CKV2_K8S_6": "it listens on no port",
}


@pytest.mark.parametrize("version", [3, 4])
@pytest.mark.parametrize("name", CASES)
def test_both_helms_lint_it(name: str, version: int) -> None:
    """Neither helm 3 nor helm 4 finds anything, warnings included, with any of the ci values."""
    done = helm("lint", "--strict", "--values", f"{CHART}/ci/{name}-values.yaml", version=version)
    assert done.returncode == 0, done.stdout
    assert "[WARNING]" not in done.stdout


@pytest.mark.parametrize("name", CASES)
def test_both_helms_render_the_same(name: str) -> None:
    """Both helm 3 and helm 4 make the same manifests."""
    assert case(name, 3) == case(name, 4)


@pytest.mark.parametrize("version", ["1.28", "1.31", "1.35"])
@pytest.mark.parametrize("name", CASES)
def test_kubernetes_takes_it(name: str, version: str) -> None:
    """Every manifest fits the strict schema of old and new Kubernetes."""
    builtin = [manifest for manifest in case(name) if manifest["kind"] not in CUSTOM]
    assert len(builtin) >= 5
    for manifest in builtin:
        kubernetes_validate.validate(manifest, version, strict=True)


def test_custom_resources_fit_their_types(tmp_path: Path) -> None:
    """The operators' own types know every key and value of their resources, and refuse others."""
    found = [m for name in CASES for m in case(name) if m["kind"] in CUSTOM]
    assert {manifest["kind"] for manifest in found} >= set(CUSTOM) - {"PrometheusRule"}
    assert _fits_types(found, tmp_path) == ""
    wrong = json.loads(json.dumps(next(m for m in found if m["kind"] == "ScaledObject")))
    wrong["spec"]["triggers"][0]["treshold"] = "1"
    assert "treshold" in _fits_types([wrong], tmp_path)


def _fits_types(manifests: list[dict[str, object]], folder: Path) -> str:
    """What the TypeScript compiler and then the types' own schemas find."""
    kinds = {str(manifest["kind"]) for manifest in manifests}
    lines = [f'import {{ {k}, I{k} }} from "@kubernetes-models/{CUSTOM[k]}";' for k in kinds]
    for number, manifest in enumerate(manifests):
        kind = manifest["kind"]
        # A literal: the compiler refuses keys that its type does not have.
        lines += [
            f"const m{number}: I{kind} = {json.dumps(manifest)};",
            f"new {kind}(m{number}).validate();",
        ]
    (folder / "manifests.mts").write_text("\n".join(lines))
    modules = folder / "node_modules"
    if not modules.exists():
        modules.symlink_to(TOOLS / "node_modules")
    compiler = modules / "typescript" / "bin" / "tsc"
    options = ["--module", "nodenext", "--target", "es2022", "--strict", "--skipLibCheck"]
    compiled = subprocess.run(
        [node(), compiler, *options, "manifests.mts"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if compiled.returncode:
        return compiled.stdout
    run = [node(), "--preserve-symlinks", "manifests.mjs"]
    return subprocess.run(run, cwd=folder, capture_output=True, text=True, check=False).stderr


def test_checkov_finds_what_is_meant_to_be(tmp_path: Path) -> None:
    """Every manifest passes checkov, but for the checks that are skipped for a stated reason."""
    for name in CASES:
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump_all(case(name)))
    done = subprocess.run(
        [TOOLS / "checkov" / "bin" / "checkov", "--directory", tmp_path, "--output", "json",
         "--framework", "kubernetes", "--skip-download"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HOME": str(tmp_path)},
    )  # fmt: skip
    report = json.loads(done.stdout)
    failed = {
        (check["check_id"], check["resource"].partition(".")[0])
        for check in report["results"]["failed_checks"]
    }
    test_pod = {(check, "Pod") for check in SKIPPED_FOR_TEST_POD}
    assert {check for check, _ in failed - test_pod} == set(SKIPPED)
    assert failed >= test_pod, "a skip is not needed any more"
    assert report["summary"]["passed"] > 1000
