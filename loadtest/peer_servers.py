"""Start taskvec, vLLM's server and infinity with the same checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from server import free_port, wait_ready
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.checkpoint.vllm_copy import make_vllm_copy
from taskvec.engines.vllm.arguments import VllmOptions, server_command

START_SECONDS = 300.0
"""Timeout of a start; vLLM takes up to a minute on two cores, longer on a busy machine."""

MAX_TOKENS = 2048
"""Maximum tokens of a text; vLLM reserves memory for one text of this length."""


class RunningServer(NamedTuple):
    """URL of a ready server, and the id of its main process."""

    url: str
    pid: int


@contextmanager
def taskvec_server(model: str, workdir: Path) -> Iterator[RunningServer]:
    """Run taskvec with its default settings; ``workdir`` gets its log."""
    command = [sys.executable, "-m", "taskvec", "serve", "--model", model]
    with _running(command, "/health/ready", workdir / "taskvec.log") as server:
        yield server


@contextmanager
def vllm_server(python: Path, checkpoint: Checkpoint, workdir: Path) -> Iterator[RunningServer]:
    """Run a vLLM server with the command line of ``taskvec engine-args``."""
    options = VllmOptions(memory_share=0.15, max_tokens=MAX_TOKENS)
    words = server_command(checkpoint, make_vllm_copy(checkpoint, workdir), options, gpu=False)
    # The CPU build's `vllm` command fails; its server module has the same options.
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", *words[2:]]
    command += ["--host", "127.0.0.1", "--disable-uvicorn-access-log"]
    environment = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with _running(command, "/health", workdir / "vllm.log", environment) as server:
        yield server


@contextmanager
def infinity_server(python: Path, checkpoint: Checkpoint, workdir: Path) -> Iterator[RunningServer]:
    """Run an infinity server, which reads the format of sentence-transformers, see merged.py."""
    command = [str(python.with_name("infinity_emb")), "v2", "--model-id", str(checkpoint.folder)]
    command += ["--served-model-name", checkpoint.card.name, "--url-prefix", "/v1"]
    command += ["--engine", "torch", "--device", "cpu", "--dtype", "bfloat16"]
    command += ["--host", "127.0.0.1", "--log-level", "error"]
    environment = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    with _running(command, "/health", workdir / "infinity.log", environment) as server:
        yield server


@contextmanager
def _running(
    command: Sequence[str], health: str, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[RunningServer]:
    port = free_port()
    # Each server chooses its number of threads itself if this is not set.
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [*command, "--port", str(port)],
            env=inherited | dict(environment or {}),
            stdout=output,
            stderr=output,
        ) as process,
    ):
        try:
            try:
                wait_ready(port, health, START_SECONDS, process)
            except (TimeoutError, ChildProcessError) as error:
                raise RuntimeError(f"{error}: {log.read_text()[-2000:]}") from None
            yield RunningServer(f"http://127.0.0.1:{port}", process.pid)
        finally:
            process.terminate()


def installed(python: Path, package: str) -> str:
    """Return the version of a package in another environment."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run(
        [str(python), "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
