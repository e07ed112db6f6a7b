"""The split shape: vLLM servers that only their gateway reaches, and air gaps."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from charts import (
    NAMESPACE,
    Manifest,
    case,
    containers,
    of_kind,
    only,
    pods,
    refusal,
    render,
    settings,
)
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.checkpoint.vllm_copy import make_vllm_copy
from taskvec.engines.vllm.arguments import VllmOptions, server_command

pytestmark = pytest.mark.full("the Helm chart, rendered by Helm and checked against schemas")

SPLIT = ["split", "airgapped", "full"]


def engine(manifests: tuple[Manifest, ...]) -> Manifest:
    """The pod of the engine servers."""
    pod: Manifest = only(manifests, "StatefulSet")["spec"]["template"]
    return pod


@pytest.mark.parametrize("name", SPLIT)
def test_the_gateway_looks_up_the_headless_service(name: str) -> None:
    """TASKVEC_ENGINE_URL names the servers' headless Service, by its port."""
    manifests = case(name)
    (service,) = [s for s in of_kind(manifests, "Service") if s["spec"].get("clusterIP") == "None"]
    stateful = only(manifests, "StatefulSet")
    assert stateful["spec"]["serviceName"] == service["metadata"]["name"]
    given = settings(manifests)
    assert given["TASKVEC_ENGINE"] == "remote"
    (port,) = service["spec"]["ports"]
    host = f"{service['metadata']['name']}.{NAMESPACE}.svc"
    assert given["TASKVEC_ENGINE_URL"] == f"dns://{host}:{port['port']}"
    (vllm,) = engine(manifests)["spec"]["containers"]
    # A headless name gives the pods' addresses: its port is theirs.
    assert vllm["ports"] == [{"name": "http", "containerPort": port["port"]}]
    assert f"--port={port['port']}" in vllm["args"]


@pytest.mark.parametrize(
    "values",
    [{}, {"engine": {"args": ["--max-loras", "it's $HOME"]}}, {"engine": {"device": "cpu"}},
     {"config": {"TASKVEC_MAX_TOKENS": 77, "TASKVEC_DTYPE": "float16"}}],
    ids=str,
)  # fmt: skip
def test_a_server_runs_what_engine_args_prints(
    values: dict[str, dict[str, object]], tmp_path: Path, default_checkpoint: Checkpoint
) -> None:
    """The container's command starts vLLM with the words of `taskvec engine-args`, then its own."""
    (vllm,) = engine(render({"mode": "split"} | values))["spec"]["containers"]
    for program, line in (
        ("taskvec", f'exec {shlex.quote(sys.executable)} -m taskvec "$@"'),
        ("vllm", 'printf "%s\\n" vllm "$@"'),
    ):
        (tmp_path / program).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / program).chmod(0o755)
    folder = settings(render({"mode": "split"}))["TASKVEC_CACHE_DIR"]
    script, *words = vllm["args"]
    done = subprocess.run(
        [*vllm["command"], script.replace(folder, str(tmp_path / "cache")), *words],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stderr
    config = values.get("config", {})
    options = VllmOptions(
        dtype=str(config.get("TASKVEC_DTYPE", "auto")),
        max_tokens=int(str(config.get("TASKVEC_MAX_TOKENS", 0))),
    )
    chosen = values.get("engine", {})
    gpu = chosen.get("device", "cuda") == "cuda"
    copy = make_vllm_copy(default_checkpoint, tmp_path / "cache")
    assert done.stdout.splitlines() == [
        *server_command(default_checkpoint, copy, options, gpu=gpu),
        "--port=8000",
        "--shutdown-timeout=45",
        *chosen.get("args", []),
    ]


def test_a_server_whose_model_cannot_be_read_does_not_start(tmp_path: Path) -> None:
    """Where `taskvec engine-args` fails, so does the container, and vLLM is not run."""
    (vllm,) = engine(render({"mode": "split"}))["spec"]["containers"]
    for program, line in (("taskvec", "exit 3"), ("vllm", "echo started")):
        (tmp_path / program).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / program).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [*vllm["command"], *vllm["args"]]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout) == (3, "")


def test_the_task_of_a_merged_model_is_passed_on() -> None:
    """Gateway and servers get the task; one with a quote, which a shell would read, is refused."""
    values = {"mode": "split", "config": {"TASKVEC_TASK_NAME": "clustering"}}
    manifests = render(values)
    assert settings(manifests)["TASKVEC_TASK_NAME"] == "clustering"
    (vllm,) = engine(manifests)["spec"]["containers"]
    assert " --task-name 'clustering' " in vllm["args"][0]
    assert "TASK_NAME" in refusal(values | {"config": {"TASKVEC_TASK_NAME": "a'; b"}})


@pytest.mark.parametrize("name", SPLIT)
def test_servers_are_reached_from_the_gateway_alone(name: str) -> None:
    """Of the release's pods only the gateway's may reach the servers, others as values say."""
    manifests = case(name)
    labels = engine(manifests)["metadata"]["labels"]
    (policy,) = [
        policy
        for policy in of_kind(manifests, "NetworkPolicy")
        if policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    ]
    (rule,) = policy["spec"]["ingress"]
    gateway, *others = rule["from"]
    wanted = gateway["podSelector"]["matchLabels"].items()
    makers = {m for m, pod in pods(manifests) if wanted <= pod["metadata"]["labels"].items()}
    assert makers == {"Deployment"}
    assert len(others) == (name != "airgapped")
    assert all("podSelector" not in other for other in others)


def test_gateway_and_servers_share_the_key() -> None:
    """What the gateway sends and the servers ask for is one Secret's key."""
    manifests = case("full")
    found = {}
    for _, pod in pods(manifests):
        for container in pod["spec"]["containers"]:
            for entry in container.get("env", []):
                if entry["name"] in ("TASKVEC_ENGINE_API_KEY", "VLLM_API_KEY"):
                    found[entry["name"]] = entry["valueFrom"]["secretKeyRef"]
    reference = {"name": "engine-key", "key": "secret"}
    assert found == {"TASKVEC_ENGINE_API_KEY": reference, "VLLM_API_KEY": reference}


def test_a_gateway_without_servers_is_not_restarted() -> None:
    """The gateway's start is over when it is live: its servers may load for longer."""
    paths = {}
    for mode in ("cpu", "gpu", "split"):
        pod = only(render({"mode": mode}), "Deployment")["spec"]["template"]["spec"]
        paths[mode] = pod["containers"][0]["startupProbe"]["httpGet"]["path"]
    assert paths == {"cpu": "/health/ready", "gpu": "/health/ready", "split": "/health/live"}


def test_a_hub_s_model_is_fetched_before_the_start() -> None:
    """Gateway and servers each fetch a hub's model first; a built-in one needs no fetching."""
    for _, pod in pods(case("split")):
        for container in pod["spec"].get("initContainers", []):
            assert container["name"] == "download"
            assert "'jinaai/jina-embeddings-v5-text-small'" in container["args"][0]
    names = [c["name"] for _, pod in pods(case("split")) for c in containers(pod)]
    assert names.count("download") == 2
    off = {"mode": "split", "model": {"name": "owner/model", "download": False}}
    for manifests in (case("default"), render(off)):
        assert not any("initContainers" in pod["spec"] for _, pod in pods(manifests))


def test_an_air_gapped_release_asks_no_network() -> None:
    """Offline, nothing is fetched, hubs are off, and pods reach DNS, servers and what is listed."""
    manifests = case("airgapped")
    for maker, pod in pods(manifests):
        assert "initContainers" not in pod["spec"]
        if maker != "Pod":
            (container,) = pod["spec"]["containers"]
            assert {"name": "HF_HUB_OFFLINE", "value": "1"} in container["env"]
            claims = [v["persistentVolumeClaim"] for v in pod["spec"]["volumes"] if "persistentVolumeClaim" in v]  # noqa: E501  # fmt: skip
            assert claims == [{"claimName": "models"}]
    policies = of_kind(manifests, "NetworkPolicy")
    assert len(policies) == 2
    for policy in policies:
        assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
        assert all(rule["to"] for rule in policy["spec"]["egress"])
    for name in ("split", "default"):
        for policy in of_kind(case(name), "NetworkPolicy"):
            assert policy["spec"]["policyTypes"] == ["Ingress"]
