"""What `helm test` runs."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from charts import Manifest, case, only, render
from conftest import running_server

pytestmark = pytest.mark.full("the Helm chart, rendered by Helm and checked against schemas")

SECRET = "tv-of-the-test"  # noqa: S105 - of nothing
DIGEST = hashlib.sha256(SECRET.encode()).hexdigest()


def run(pod: Manifest, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the pod's command here, with some of its variables changed."""
    (container,) = pod["spec"]["containers"]
    given = {entry["name"]: entry.get("value", "") for entry in container["env"]}
    assert container["command"] == ["python3", "-c"]
    return subprocess.run(
        [sys.executable, "-I", "-c", *container["args"]],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={"PATH": os.environ["PATH"]} | given | variables,
    )


def test_it_asks_the_service() -> None:
    """It asks the release's Service by its port, and over TLS where that is on."""
    for name in ("default", "full"):
        manifests = case(name)
        pod = only(manifests, "Pod")
        assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
        host, port, scheme = {
            "default": ("embeddings-taskvec", 80, "http"),
            "full": ("embeddings", 443, "https"),
        }[name]
        (container,) = pod["spec"]["containers"]
        assert {"name": "URL", "value": f"{scheme}://{host}:{port}"} in container["env"]
        services = [m for m in manifests if m["kind"] == "Service"]
        assert host in {service["metadata"]["name"] for service in services}


def test_it_embeds_and_checks(tmp_path: Path) -> None:
    """Against a real server it passes with a key, and knows a refusal that should not be."""
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[[keys]]\nname = "test"\nsha256 = "{DIGEST}"\n')
    pod = only(render(), "Pod")
    with running_server("--keys-file", str(keys)) as url:
        passed = run(pod, URL=url, API_KEY=SECRET, ASKS_FOR_KEY="true")
        assert passed.returncode == 0, passed.stderr
        assert "two vectors" in passed.stdout
        refused = run(only(case("cpu"), "Pod"), URL=url)
        assert refused.returncode == 0, refused.stderr
        assert "refused without a key" in refused.stdout
        for variables in ({"API_KEY": "wrong", "ASKS_FOR_KEY": "true"}, {}):
            failed = run(pod, URL=url, **variables)
            assert failed.returncode == 1
            assert "401" in failed.stderr
