"""What the chart's pods may do and write."""

from __future__ import annotations

import pytest

from charts import CASES, case, containers, only, pods, settings

pytestmark = pytest.mark.full("the Helm chart, rendered by Helm and checked against schemas")

every_case = pytest.mark.parametrize("name", CASES)


@every_case
def test_pods_pass_the_restricted_standard(name: str) -> None:
    """Every pod fits Kubernetes' restricted Pod Security Standard, and mounts no token."""
    allowed = {"configMap", "emptyDir", "persistentVolumeClaim", "secret"}
    for _, pod in pods(case(name)):
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] >= 10_000
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for volume in spec.get("volumes", []):
            assert set(volume) - {"name"} <= allowed
        for container in containers(pod):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert not any("hostPort" in port for port in container.get("ports", []))


@every_case
def test_no_service_becomes_a_setting(name: str) -> None:
    """A Service named taskvec would give every pod a TASKVEC_PORT that is none: links are off."""
    assert all(pod["spec"]["enableServiceLinks"] is False for _, pod in pods(case(name)))


@every_case
def test_mounts_have_volumes(name: str) -> None:
    """Every mount has its volume, every volume is mounted, none by subPath."""
    for maker, pod in pods(case(name)):
        volumes = {volume["name"] for volume in pod["spec"].get("volumes", [])}
        if maker == "StatefulSet":
            volumes |= {
                claim["metadata"]["name"]
                for claim in only(case(name), maker)["spec"].get("volumeClaimTemplates", [])
            }
        mounts = [mount for c in containers(pod) for mount in c.get("volumeMounts", [])]
        assert {mount["name"] for mount in mounts} == volumes
        assert not any("subPath" in mount for mount in mounts)


@every_case
def test_what_must_be_written_is_on_a_volume(name: str) -> None:
    """The folders that settings and libraries write to are on volumes: the root is read-only."""
    manifests = case(name)
    given = settings(manifests)
    for _, pod in pods(manifests):
        for container in containers(pod):
            variables = {entry["name"]: entry.get("value") for entry in container.get("env", [])}
            if "HF_HOME" not in variables:
                continue
            written = [variables["HOME"], variables["HF_HOME"], given["TASKVEC_CACHE_DIR"], "/tmp"]  # noqa: S108
            places = [m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")]
            for folder in written:
                assert any(f"{folder}/".startswith(f"{place}/") for place in places)
