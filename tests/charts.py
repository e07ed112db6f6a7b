"""The Helm chart as tests see it: rendered once for each values file, by the fetched helms."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
CHART = ROOT / "deploy" / "helm" / "taskvec"
TOOLS = ROOT / ".cache" / "chart"

RELEASE, NAMESPACE = "embeddings", "search"
CASES = sorted(file.name.removesuffix("-values.yaml") for file in (CHART / "ci").iterdir())

Manifest = dict[str, Any]


def helm(
    *arguments: str, version: int = 4, chart: Path = CHART
) -> subprocess.CompletedProcess[str]:
    """Run `helm COMMAND CHART OPTIONS` without any state of this machine's helm."""
    program = TOOLS / f"helm{version}"
    assert program.is_file(), "the tools of the chart's tests are missing: run `make test-chart`"
    with tempfile.TemporaryDirectory() as home:
        homes = {f"HELM_{kind}_HOME": home for kind in ("CACHE", "CONFIG", "DATA")}
        command, *options = arguments
        release = [RELEASE] if command == "template" else []
        return subprocess.run(
            [program, command, *release, chart, "--namespace", NAMESPACE, *options],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env={"PATH": os.environ["PATH"], "KUBECONFIG": os.devnull} | homes,
        )


@functools.cache
def case(name: str, version: int = 4) -> tuple[Manifest, ...]:
    """What one of the chart's ci/*-values.yaml gives."""
    return _manifests(
        helm("template", "--values", f"{CHART}/ci/{name}-values.yaml", version=version)
    )


def render(values: dict[str, Any] | None = None, *, chart: Path = CHART) -> tuple[Manifest, ...]:
    """What some values give."""
    return _manifests(template(values or {}, chart))


def refusal(values: dict[str, Any], *, chart: Path = CHART) -> str:
    """What helm says of values that it must refuse."""
    done = template(values, chart)
    assert done.returncode != 0, f"{values} were rendered"
    return done.stderr


def template(
    values: dict[str, Any], chart: Path, *options: str
) -> subprocess.CompletedProcess[str]:
    """Run `helm template` with some values."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(values, file)
        file.flush()
        return helm("template", "--values", file.name, *options, chart=chart)


def _manifests(done: subprocess.CompletedProcess[str]) -> tuple[Manifest, ...]:
    assert done.returncode == 0, done.stderr
    return tuple(filter(None, yaml.safe_load_all(done.stdout)))


def of_kind(manifests: tuple[Manifest, ...], kind: str) -> list[Manifest]:
    """The manifests of one kind."""
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def only(manifests: tuple[Manifest, ...], kind: str) -> Manifest:
    """The one manifest of a kind."""
    (manifest,) = of_kind(manifests, kind)
    return manifest


def pods(manifests: tuple[Manifest, ...]) -> Iterator[tuple[str, Manifest]]:
    """Every pod: who makes it, and its metadata and spec."""
    for manifest in manifests:
        if manifest["kind"] in ("Deployment", "StatefulSet"):
            yield manifest["kind"], manifest["spec"]["template"]
        elif manifest["kind"] == "Pod":
            yield "Pod", manifest


def containers(pod: Manifest) -> list[Manifest]:
    """The containers of a pod, init containers first."""
    spec = pod["spec"]
    return [*spec.get("initContainers", []), *spec["containers"]]


def settings(manifests: tuple[Manifest, ...]) -> dict[str, str]:
    """The TASKVEC_* variables that the ConfigMap gives."""
    maps = of_kind(manifests, "ConfigMap")
    (data,) = [entry["data"] for entry in maps if "TASKVEC_MODEL" in entry["data"]]
    return data


def leaves(values: dict[str, Any], path: str = "") -> list[str]:
    """The paths of all values that are no mapping, or an empty one."""
    found = []
    for key, value in values.items():
        here = f"{path}.{key}"
        found += leaves(value, here) if isinstance(value, dict) and value else [here]
    return found
