"""What scales, and by which series."""

from __future__ import annotations

import itertools
import re

import pytest

from charts import CASES, case, of_kind, only, render
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.metrics.registry import Metrics
from taskvec.service import task_table

pytestmark = pytest.mark.full("the Helm chart, rendered by Helm and checked against schemas")


@pytest.mark.parametrize("name", CASES)
def test_what_is_scaled_states_no_replicas(name: str) -> None:
    """An autoscaled workload leaves its replicas out, any other states them."""
    manifests = case(name)
    targets = {
        (scaler["spec"]["scaleTargetRef"]["kind"], scaler["spec"]["scaleTargetRef"]["name"])
        for scaler in itertools.chain(
            of_kind(manifests, "HorizontalPodAutoscaler"), of_kind(manifests, "ScaledObject")
        )
    }
    workloads = [*of_kind(manifests, "Deployment"), *of_kind(manifests, "StatefulSet")]
    for workload in workloads:
        scaled = (workload["kind"], workload["metadata"]["name"]) in targets
        assert ("replicas" in workload["spec"]) != scaled
    assert len(targets) == (name in ("full", "keda"))


def test_scaling_follows_series_that_there_are(default_checkpoint: Checkpoint) -> None:
    """HorizontalPodAutoscaler and ScaledObject ask for series that /metrics has."""
    page = Metrics(task_table(default_checkpoint).names).render("ready")
    text = page.decode() if isinstance(page, bytes) else page
    exported = set(re.findall(r"^(taskvec_\w+)", text, re.MULTILINE))
    wanted = {"taskvec_queue_tokens", "taskvec_queue_oldest_seconds"}
    assert wanted <= exported
    triggers = only(case("keda"), "ScaledObject")["spec"]["triggers"]
    queries = " ".join(trigger["metadata"]["query"] for trigger in triggers)
    assert set(re.findall(r"taskvec_\w+", queries)) == wanted
    hpa = only(render({"autoscaling": {"hpa": {"enabled": True}}}), "HorizontalPodAutoscaler")
    assert {metric["pods"]["metric"]["name"] for metric in hpa["spec"]["metrics"]} == wanted


def test_servers_are_scaled_by_their_own_series() -> None:
    """In mode split, where gateways see no queue, both scalers ask for what vLLM's servers say."""
    (metric,) = only(case("full"), "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == "vllm:num_requests_waiting"
    assert metric["pods"]["target"] == {"type": "AverageValue", "averageValue": "16"}
    keda = {"enabled": True, "serverAddress": "http://prometheus"}
    manifests = render({"mode": "split", "autoscaling": {"keda": keda}})
    (trigger,) = only(manifests, "ScaledObject")["spec"]["triggers"]
    query = trigger["metadata"]["query"]
    assert query.startswith("sum(vllm:num_requests_waiting{")
    (pattern,) = re.findall(r'pod=~"([^"]*)"', query)
    servers = only(manifests, "StatefulSet")["metadata"]["name"]
    assert re.fullmatch(pattern, f"{servers}-0")
    assert not re.fullmatch(pattern, f"{only(manifests, 'Deployment')['metadata']['name']}-7c9-x2")
