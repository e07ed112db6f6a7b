"""What the chart's pods are told, and who reaches them."""

from __future__ import annotations

import hashlib

import pytest
import yaml

from charts import CASES, CHART, Manifest, case, containers, of_kind, only, pods, render, settings
from fakes import FakeEngine
from taskvec.api.app import create_app
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.service import build_service
from taskvec.settings import Settings, environment_variable

pytestmark = pytest.mark.full("the Helm chart, rendered by Helm and checked against schemas")

every_case = pytest.mark.parametrize("name", CASES)


def labels(pod: Manifest) -> set[tuple[str, str]]:
    """A pod's labels."""
    return set(pod["metadata"]["labels"].items())


def selectors(manifests: tuple[Manifest, ...]) -> list[tuple[str, dict[str, str]]]:
    """Every selector of pods: whose, and the labels that it wants."""
    found = []
    for manifest in manifests:
        spec, kind = manifest.get("spec", {}), manifest["kind"]
        if kind == "Service":
            found.append((kind, spec["selector"]))
        elif kind == "NetworkPolicy":
            found.append((kind, spec["podSelector"]["matchLabels"]))
        elif kind in ("Deployment", "StatefulSet", "PodDisruptionBudget", "PodMonitor"):
            found.append((kind, spec["selector"]["matchLabels"]))
        if "template" in spec:
            spreads = spec["template"]["spec"].get("topologySpreadConstraints", [])
            found += [("spread", spread["labelSelector"]["matchLabels"]) for spread in spreads]
    return found


@every_case
def test_selectors_find_one_workload(name: str) -> None:
    """Services, policies, budgets, monitors and spreads each select the pods of one workload."""
    manifests = case(name)
    for kind, wanted in selectors(manifests):
        chosen = [maker for maker, pod in pods(manifests) if wanted.items() <= labels(pod)]
        assert len(chosen) == 1, (kind, wanted, chosen)
        assert chosen[0] != "Pod"


@every_case
def test_a_service_monitor_finds_its_service(name: str) -> None:
    """A ServiceMonitor selects one Service, and scrapes a port that this has."""
    manifests = case(name)
    services = of_kind(manifests, "Service")
    for monitor in of_kind(manifests, "ServiceMonitor"):
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        (service,) = [s for s in services if wanted <= s["metadata"]["labels"].items()]
        ports = {port["name"] for port in service["spec"]["ports"]}
        assert {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} <= ports


@every_case
def test_ports_are_the_containers(name: str) -> None:
    """Services, policies, monitors and probes name a port that the selected container opens."""
    manifests = case(name)
    for manifest in manifests:
        spec = manifest.get("spec", {})
        if manifest["kind"] == "Service":
            wanted, asked = spec["selector"], [port["targetPort"] for port in spec["ports"]]
        elif manifest["kind"] == "NetworkPolicy":
            wanted = spec["podSelector"]["matchLabels"]
            asked = [port["port"] for rule in spec["ingress"] for port in rule["ports"]]
        elif manifest["kind"] == "PodMonitor":
            wanted = spec["selector"]["matchLabels"]
            asked = [endpoint["port"] for endpoint in spec["podMetricsEndpoints"]]
        else:
            continue
        (pod,) = [pod for _, pod in pods(manifests) if wanted.items() <= labels(pod)]
        opened = {port["name"] for c in containers(pod) for port in c.get("ports", [])}
        assert set(asked) <= opened
    for kind, pod in pods(manifests):
        for container in pod["spec"]["containers"]:
            opened = {port["name"] for port in container.get("ports", [])}
            found = [container[key] for key in container if key.endswith("Probe")]
            assert len(found) == (0 if kind == "Pod" else 3)
            assert {probe["httpGet"]["port"] for probe in found} <= opened


@every_case
def test_taskvec_listens_where_its_port_is(name: str) -> None:
    """The container port is TASKVEC_PORT, on all addresses."""
    manifests = case(name)
    (container,) = only(manifests, "Deployment")["spec"]["template"]["spec"]["containers"]
    assert settings(manifests)["TASKVEC_PORT"] == str(container["ports"][0]["containerPort"])
    assert settings(manifests)["TASKVEC_HOST"] == "0.0.0.0"  # noqa: S104 - in a pod of its own


@pytest.mark.parametrize("mode", ["cpu", "split"])
def test_a_dual_stack_service(mode: str) -> None:
    """Pods listen on both families, engine servers as well, and the Services have both."""
    service = {"host": "::", "ipFamilyPolicy": "PreferDualStack"}
    manifests = render({"mode": mode, "service": service})
    assert settings(manifests)["TASKVEC_HOST"] == "::"
    services = of_kind(manifests, "Service")
    assert len(services) == (2 if mode == "split" else 1)
    assert {each["spec"]["ipFamilyPolicy"] for each in services} == {"PreferDualStack"}
    for each in of_kind(manifests, "StatefulSet"):
        (container,) = each["spec"]["template"]["spec"]["containers"]
        assert "--host=::" in container["args"]


@every_case
def test_probes_ask_routes_of_the_application(name: str, default_checkpoint: Checkpoint) -> None:
    """Probes and scrapes of taskvec ask routes that the application has, over its protocol."""
    manifests = case(name)
    engine = FakeEngine(default_checkpoint.card)
    app = create_app(
        build_service(Settings(), checkpoint=default_checkpoint, engine=engine), [].append
    )
    routes = set(app.openapi()["paths"])
    pod = only(manifests, "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    scheme = "HTTPS" if "TASKVEC_TLS_CERT" in settings(manifests) else "HTTP"
    for kind, path in (("readiness", "/health/ready"), ("liveness", "/health/live")):
        probe = container[f"{kind}Probe"]["httpGet"]
        assert (probe["path"], probe["scheme"]) == (path, scheme)
    asked = {container[key]["httpGet"]["path"] for key in container if key.endswith("Probe")}
    for kind, key in (("ServiceMonitor", "endpoints"), ("PodMonitor", "podMetricsEndpoints")):
        for monitor in of_kind(manifests, kind):
            asked |= {endpoint["path"] for endpoint in monitor["spec"][key]}
    assert asked <= routes


@every_case
def test_every_variable_is_a_setting(name: str) -> None:
    """Every TASKVEC_* variable is a setting, and together they are settings that hold."""
    manifests = case(name)
    known = {environment_variable(field): field for field in Settings.model_fields}
    given = settings(manifests)
    for _, pod in pods(manifests):
        for container in containers(pod):
            names = [entry["name"] for entry in container.get("env", [])]
            assert len(names) == len(set(names))
            assert {n for n in names if n.startswith("TASKVEC_")} <= set(known) - set(given)
    assert set(given) <= set(known)
    assert all(isinstance(value, str) for value in given.values())
    Settings(**{known[variable]: value for variable, value in given.items()})


@every_case
def test_the_grace_period_fits_the_drain(name: str) -> None:
    """A pod is killed only after its hook, its grace and its drain, and 15 seconds more."""
    manifests = case(name)
    given = settings(manifests)
    drain = float(given["TASKVEC_DRAIN_GRACE"]) + float(given["TASKVEC_DRAIN_TIMEOUT"])
    pod = only(manifests, "Deployment")["spec"]["template"]["spec"]
    assert 15 <= pod["terminationGracePeriodSeconds"] - drain < 16
    assert "lifecycle" not in pod["containers"][0]
    for engine in of_kind(manifests, "StatefulSet"):
        pod = engine["spec"]["template"]["spec"]
        (vllm,) = pod["containers"]
        _, hook = vllm["lifecycle"]["preStop"]["exec"]["command"]
        (timeout,) = [a for a in vllm["args"] if a.startswith("--shutdown-timeout=")]
        seconds = int(hook) + int(timeout.partition("=")[2])
        assert pod["terminationGracePeriodSeconds"] == seconds + 15


def test_a_draining_pod_is_seen_to_be_unready() -> None:
    """The default grace is longer than the readiness probe needs to see that a pod leaves."""
    manifests = case("default")
    (container,) = only(manifests, "Deployment")["spec"]["template"]["spec"]["containers"]
    probe = container["readinessProbe"]
    needed = probe["periodSeconds"] * probe["failureThreshold"]
    assert needed < float(settings(manifests)["TASKVEC_DRAIN_GRACE"])


def test_keys_are_the_file_that_is_read() -> None:
    """The keys file is where the Secret is mounted, under the Secret's own key."""
    manifests = case("cpu")
    file = settings(manifests)["TASKVEC_KEYS_FILE"]
    secret = only(manifests, "Secret")
    pod = only(manifests, "Deployment")["spec"]["template"]["spec"]
    (volume,) = [v for v in pod["volumes"] if "secret" in v]
    (mount,) = [m for m in pod["containers"][0]["volumeMounts"] if m["name"] == volume["name"]]
    assert volume["secret"]["secretName"] == secret["metadata"]["name"]
    assert [f"{mount['mountPath']}/{key}" for key in secret["stringData"]] == [file]
    values = yaml.safe_load((CHART / "ci" / "cpu-values.yaml").read_text())
    assert secret["stringData"]["keys.toml"] == values["auth"]["keys"]
    assert settings(case("full"))["TASKVEC_KEYS_FILE"].endswith("/our-keys.toml")


def test_a_changed_setting_starts_new_pods() -> None:
    """The pods' annotation follows the ConfigMap."""
    sums = {
        only(render({"config": config}), "Deployment")["spec"]["template"]["metadata"][
            "annotations"
        ]["checksum/config"]
        for config in ({}, {"TASKVEC_MAX_TEXTS": 7}, {"TASKVEC_MAX_TEXTS": 8})
    }
    assert len(sums) == 3
    assert all(len(digest) == hashlib.sha256().digest_size * 2 for digest in sums)


@every_case
def test_gpus_are_where_vllm_is(name: str) -> None:
    """Pods with vLLM get GPUs, /dev/shm and the taint's toleration; others none of them."""
    for maker, pod in pods(case(name)):
        main = pod["spec"]["containers"][0]
        vllm = maker == "StatefulSet" or (maker == "Deployment" and name in ("gpu", "keda"))
        assert ("nvidia.com/gpu" in main["resources"]["limits"]) == vllm
        assert ("/dev/shm" in {m["mountPath"] for m in main.get("volumeMounts", [])}) == vllm  # noqa: S108
        tolerated = {entry["key"] for entry in pod["spec"].get("tolerations", [])}
        assert ("nvidia.com/gpu" in tolerated) == vllm
