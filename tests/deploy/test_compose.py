"""The compose file says what Docker understands, and names only what there is."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import yaml

from conftest import repository
from dockerfile import lineage, read_stages
from promql import promtool
from taskvec.settings import Settings, environment_variable

FOLDER = repository() / "deploy"
FILE = repository() / "docker-compose.yml"
COMPOSE = yaml.safe_load(FILE.read_text())
SERVICES = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}
STAGES = read_stages(repository() / "Dockerfile")


def test_it_follows_the_schema() -> None:
    """The specification's schema accepts it."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, FILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_without_a_profile_it_is_the_service_alone() -> None:
    """`docker compose up` starts one container, with the built-in model."""
    (name,) = (name for name, service in SERVICES.items() if "profiles" not in service)
    assert SERVICES[name]["build"]["target"] == "cpu"
    assert SERVICES[name]["environment"]["TASKVEC_MODEL"] == "${TASKVEC_MODEL:-}"
    for service in OURS.values():
        assert service["build"]["context"] == ".", "a fresh clone has all that is built"
    profiles = {name for service in SERVICES.values() for name in service.get("profiles", [])}
    assert profiles == {"gpu", "observability", "cache"}


@pytest.mark.parametrize("name", SERVICES)
def test_services_have_what_they_need(name: str) -> None:
    """Mounted files, volumes, services that it waits for: all are there."""
    service = SERVICES[name]
    for volume in service.get("volumes", []):
        source = volume.split(":")[0]
        assert (
            (repository() / source).exists()
            if source.startswith(".")
            else source in COMPOSE["volumes"]
        )
    for other, terms in service.get("depends_on", {}).items():
        checked = "healthcheck" in SERVICES[other] or other in OURS
        assert checked or terms["condition"] == "service_started"
        shared = set(SERVICES[other].get("profiles", [])) <= set(service.get("profiles", []))
        assert shared or terms["required"] is False, "it may be of a profile that is not used"


@pytest.mark.parametrize("name", SERVICES)
def test_containers_may_little(name: str) -> None:
    """The root is read-only, no capability is left, and only this machine reaches a port."""
    service = SERVICES[name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


@pytest.mark.parametrize("name", [name for name in SERVICES if name not in OURS])
def test_other_images_have_a_version(name: str) -> None:
    """No image of others is whatever is newest."""
    assert re.search(r":v?\d+\.\d", SERVICES[name]["image"])


@pytest.mark.parametrize("name", OURS)
def test_our_services_have_a_target_and_real_settings(name: str) -> None:
    """Each is a stage with a health check; its default settings fit those of its image."""
    service = OURS[name]
    chain = list(lineage(STAGES, service["build"]["target"]))
    assert any(stage.all("HEALTHCHECK") for stage in chain)
    text = " ".join(text for stage in chain for text in stage.all("ENV"))
    variables = dict(re.findall(r"(TASKVEC_\w+)=(\S+)", text))
    for variable, value in service["environment"].items():
        if variable.startswith("TASKVEC_"):
            variables[variable] = re.sub(r"^\$\{\w+:-(.*)\}$", r"\1", value or "")
    names = {environment_variable(field): field for field in Settings.model_fields}
    settings = Settings(**{names[name]: value for name, value in variables.items() if value})
    assert int(service["stop_grace_period"].rstrip("s")) > settings.drain_timeout
    assert all(port.endswith(f":{settings.port}") for port in service.get("ports", []))


def test_the_gateway_finds_the_engines() -> None:
    """The name that it looks up is the alias of every engine server, and they take token ids."""
    host, port = re.fullmatch(
        r"dns://(\w+):(\d+)", SERVICES["gateway"]["environment"]["TASKVEC_ENGINE_URL"]
    ).groups()
    engines = [service for service in OURS.values() if service["build"]["target"] == "vllm"]
    assert len(engines) == 2
    for engine in engines:
        assert engine["networks"]["default"]["aliases"] == [host]
        assert "accept" in engine["environment"]["TASKVEC_TOKEN_INPUT"]
    assert int(port) == Settings().port


@pytest.mark.full("the files of Prometheus, checked by promtool")
def test_prometheus_scrapes_what_there_is() -> None:
    """Promtool accepts its configuration; targets are services, under jobs that alerts know."""
    file = FOLDER / "prometheus" / "prometheus.yaml"
    command = [promtool(), "check", "config", "--syntax-only", file]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    aliases = {"engine"}
    for job in yaml.safe_load(file.read_text())["scrape_configs"]:
        assert "taskvec" in job["job_name"]
        for targets in job["dns_sd_configs"]:
            assert set(targets["names"]) <= set(OURS) | aliases
            assert targets["port"] == Settings().port


def test_grafana_finds_its_source_and_the_dashboard() -> None:
    """The provisioned data source is Prometheus' service; the dashboard is mounted there."""
    provisioning = FOLDER / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())[
        "datasources"
    ]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "taskvec.yaml").read_text())[
        "providers"
    ]
    assert source["url"].split("/")[2] == "prometheus:9090"
    mounted = [volume.split(":")[1] for volume in SERVICES["grafana"]["volumes"]]
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home in mounted
    assert home.startswith(provider["options"]["path"] + "/")
    assert json.loads((FOLDER / "grafana" / "taskvec.json").read_text())["uid"] == "taskvec"
