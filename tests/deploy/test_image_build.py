"""Images that buildah builds from the Dockerfile: their contents, and containers of them.

The vllm target is not built, because its base is vLLM's own image of 20 GB;
test_images.py checks what the Dockerfile says of it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import repository
from containers import Builder, Container, Image, run, started, unavailable
from dockerfile import USER, read_stages

MISSING = unavailable()
pytestmark = [
    pytest.mark.full("the images, built and started"),
    pytest.mark.skipif(bool(MISSING), reason=MISSING or "nothing is missing"),
]

SECOND = 1_000_000_000

SIZES = {"gateway": 300e6, "cpu": 1.4e9}
"""Bytes that an image may add to its base, as docs/containers.md says."""

SIZE_WITH_CUDA = 6.5e9
"""The same for the cpu image, where the package index has CUDA builds of torch."""

EMBED = """
import json, urllib.request
request = urllib.request.Request(
    "http://127.0.0.1:8080/v1/embeddings",
    json.dumps({"input": "a text"}).encode(),
    {"content-type": "application/json"},
)
print(len(json.load(urllib.request.urlopen(request, timeout=30))["data"][0]["embedding"]))
"""

LIVE = """
import urllib.request
urllib.request.urlopen("http://127.0.0.1:8080/health/live", timeout=5)
"""

WRITABLE = """
import json, os
print(json.dumps([
    path
    for folder, _, names in os.walk("/")
    if not folder.startswith(("/dev", "/proc", "/sys"))
    for path in [folder, *(os.path.join(folder, name) for name in names)]
    if os.access(path, os.W_OK) and not os.path.islink(path)
]))
"""

COMPILERS = """
import json, shutil
print(json.dumps([name for name in ("cc", "gcc", "g++", "clang", "ld") if shutil.which(name)]))
"""


@pytest.fixture(scope="module")
def builder() -> Iterator[Builder]:
    """A store with the base image, removed at the end."""
    # /tmp may be in memory, which this would fill.
    folder = Path(tempfile.mkdtemp(prefix="taskvec-images-", dir="/var/tmp"))
    builder = Builder(folder, read_stages(repository() / "Dockerfile")["wheel"].base)
    yield builder
    builder.close()


@pytest.fixture(scope="module")
def base(builder: Builder) -> Image:
    """The Python image that the others are built on."""
    return builder.base()


@pytest.fixture(scope="module")
def gateway(builder: Builder) -> Image:
    return builder.target("gateway", VERSION="1.2.3", REVISION="abc")


@pytest.fixture(scope="module")
def cpu(builder: Builder) -> Image:
    return builder.target("cpu", VERSION="1.2.3", REVISION="abc")


@pytest.fixture(params=SIZES)
def target(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def image(request: pytest.FixtureRequest, target: str) -> Image:
    built: Image = request.getfixturevalue(target)
    return built


def test_a_build_sees_what_it_needs_and_no_more(builder: Builder) -> None:
    """Sources, lock and licence are let in; caches, tests, keys and git's folder are not."""
    names = builder.context()
    assert {"pyproject.toml", "LICENSE", "service/taskvec/api/app.py"} <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith((".", "tests"))]


def test_an_image_says_how_it_is_run(image: Image) -> None:
    """User, command, signal, port, volume and health check are what docs/containers.md says."""
    config = image.config
    assert config["User"] == f"{USER}:{USER}"
    assert config["Entrypoint"] + config["Cmd"] == ["taskvec", "serve"]
    assert config["StopSignal"] == "SIGTERM"
    assert set(config["ExposedPorts"]) == {"8080/tcp"}
    assert set(config["Volumes"]) == {config["WorkingDir"]} == {"/cache"}
    assert config["Healthcheck"] == {
        "Test": ["CMD", "python3", "-m", "taskvec.healthcheck"],
        "Interval": 5 * SECOND,
        "Timeout": 5 * SECOND,
        "StartPeriod": 600 * SECOND,
    }


def test_an_image_says_what_it_is(image: Image, target: str) -> None:
    """Its labels have the version and the revision that the build was given."""
    labels = image.config["Labels"]
    given = {name.rpartition(".")[2]: value for name, value in labels.items() if "opencont" in name}
    assert given["title"] == {"gateway": "taskvec gateway", "cpu": "taskvec"}[target]
    assert given["licenses"] == "Apache-2.0"
    assert (given["version"], given["revision"]) == ("1.2.3", "abc")


def test_an_image_adds_an_environment_and_a_user(image: Image, target: str, base: Image) -> None:
    """Nothing else of its build is left, and its size is bounded."""
    files, before = image.files(), base.files()
    added = {name: files[name] for name in files.keys() - before.keys()}
    assert not [name for name in added if not name.startswith("opt/taskvec/")]
    changed = {name for name in before if files.get(name) != before[name]}
    assert changed == {"etc/passwd", "etc/group"}
    cuda = any("/site-packages/nvidia/" in name for name in added)
    assert sum(added.values()) < (SIZE_WITH_CUDA if cuda else SIZES[target])


def test_its_user_may_write_to_one_folder(image: Image) -> None:
    """On a root that is not read-only, too; beside /cache there are the folders for all users."""
    code, output = run(image, "python3", "-c", WRITABLE, access="rw")
    assert code == 0, output
    assert set(json.loads(output)) - {"/tmp", "/var/tmp", "/run/lock"} == {"/cache"}  # noqa: S108


def test_an_image_has_no_compiler(image: Image) -> None:
    """Its packages came as wheels."""
    assert run(image, "python3", "-c", COMPILERS) == (0, "[]\n")


def test_its_health_check_fails_while_nothing_listens(image: Image) -> None:
    """It says which address does not answer."""
    code, output = run(image, *image.config["Healthcheck"]["Test"][1:])
    assert (code, "127.0.0.1:8080 does not answer" in output) == (1, True)


def test_a_gateway_is_healthy_once_its_engine_server_is(gateway: Image) -> None:
    """On a read-only root and without torch; until then, it is live and its health check fails."""
    code, output = run(gateway, "python3", "-c", "import torch")
    assert (code, "No module named 'torch'" in output) == (1, True)
    url = "http://127.0.0.1:8000"
    with started(gateway, TASKVEC_ENGINE_URL=url, TASKVEC_LOG_REQUESTS="false") as container:
        container.wait_for("python3", "-c", LIVE)
        code, output = container.health()
        assert (code, "/health/ready is 503" in output) == (1, True)
        engine = ("serve", "--port", "8000", "--token-input", "accept", "--log-level", "error")
        with container.neighbour(sys.executable, "-m", "taskvec", *engine):
            embeds_and_drains(container)


def test_the_cpu_image_needs_no_network_for_its_model(cpu: Image) -> None:
    """On a read-only root, with a loopback interface alone, it becomes healthy and embeds."""
    with started(cpu) as container:
        embeds_and_drains(container)


def embeds_and_drains(container: Container) -> None:
    """A container becomes healthy, answers, and ends with exit code 0 after its stop signal."""
    container.wait_for("python3", "-m", "taskvec.healthcheck")
    assert container.output_of("python3", "-c", EMBED) == (0, "256\n")
    code, output = container.stop()
    assert '"event":"drained"' in output
    # uvicorn ends by the signal that ended it, which the kernel spares the first process.
    assert code == 0, output
