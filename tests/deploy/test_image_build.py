"""The Dockerfile's steps, carried out without Docker: what they build starts and is healthy."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from conftest import free_port, repository, running_server, wait_until
from dockerfile import Sandbox, Stage, lineage, read_stages

pytestmark = pytest.mark.full("the images, built and started")

STAGES = read_stages(repository() / "Dockerfile")
ENTRYPOINT, COMMAND, HEALTH = (
    [text for stage in lineage(STAGES, "gateway") for text in stage.all(name)][-1]
    for name in ("ENTRYPOINT", "CMD", "HEALTHCHECK")
)
START = json.dumps(json.loads(ENTRYPOINT) + json.loads(COMMAND))
CHECK = HEALTH.split("CMD ")[1]


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    """An empty root that other users may enter, which pytest's own folders are not."""
    root = Path(tempfile.mkdtemp(prefix="taskvec-image-"))
    root.chmod(0o755)
    yield Sandbox(root, repository(), public_python())
    for folder, _, _ in os.walk(root):
        Path(folder).chmod(0o755)
    shutil.rmtree(root)


def public_python() -> str:
    """This Python, or the system's where others may not enter this one's folder."""
    own = Path(sys.base_prefix, "bin", f"python3.{sys.version_info.minor}").resolve()
    if all(folder.stat().st_mode & 0o001 for folder in own.parents):
        return str(own)
    system = Path("/usr/bin/python3").resolve()
    assert system.is_file(), f"{own} is private, and there is no {system}"
    return str(system)


def test_the_gateway_that_its_steps_build_starts_and_is_healthy(sandbox: Sandbox) -> None:
    """Made of what .dockerignore lets in, as another user, on a read-only tree, without torch.

    Its health check fails while nothing listens, passes once its engine server is proven, and
    SIGTERM lets it drain.
    """
    build(sandbox, "gateway")
    assert "No module named 'torch'" in said(sandbox, "import torch")
    assert "PermissionError" in said(sandbox, "import taskvec; open(taskvec.__file__, 'a')")
    with running_server("--token-input", "accept") as engine:
        serves(sandbox, TASKVEC_ENGINE_URL=engine)


def test_the_service_that_its_steps_build_starts_and_is_healthy(sandbox: Sandbox) -> None:
    """The cpu image does the same, with an engine in it, and no network is asked for a model."""
    build(sandbox, "cpu")
    assert "PermissionError" in said(sandbox, "import taskvec; open(taskvec.__file__, 'a')")
    serves(sandbox, HF_HUB_OFFLINE="1")


def serves(sandbox: Sandbox, **variables: str) -> None:
    """The image's command starts, embeds, and stops; its health check sees all that."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    variables |= {
        "TASKVEC_HOST": "127.0.0.1",
        "TASKVEC_PORT": str(port),
        "TASKVEC_LOG_REQUESTS": "false",
    }
    assert ended(sandbox.process(CHECK, **variables))[0] == 1
    server = sandbox.process(START, **variables)
    try:
        wait_until(f"{url}/health/ready", server)
        assert ended(sandbox.process(CHECK, **variables)) == (0, "")
        reply = httpx.post(f"{url}/v1/embeddings", json={"input": "a text"}, timeout=30)
        assert len(reply.raise_for_status().json()["data"][0]["embedding"]) == 256
    finally:
        server.terminate()
        code, output = ended(server)
    assert '"event":"drained"' in output
    # uvicorn ends by the signal that ended it; process 1 of a container is spared, and ends with 0.
    assert code == -signal.SIGTERM, output


def said(sandbox: Sandbox, code: str) -> str:
    """What the image's Python prints."""
    return ended(sandbox.process(json.dumps(["python3", "-c", code])))[1]


def build(sandbox: Sandbox, target: str) -> None:
    """Carry out the stages of a target, those that it copies from first."""
    for name in [*copied_from(STAGES, target), target]:
        sandbox.build(STAGES, name)
    sandbox.close(writable="/cache")


def copied_from(stages: dict[str, Stage], target: str) -> list[str]:
    """The stages from which a target copies, which it does to the same path."""
    copies = [text.split() for stage in lineage(stages, target) for text in stage.all("COPY")]
    assert all(source == to for _, source, to in copies), "all stages share one root here"
    return [first.removeprefix("--from=") for first, _, _ in copies]


def ended(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    """The exit code and the output of a process that ends."""
    output = process.communicate(timeout=60)[0]
    return process.returncode, output.decode()
