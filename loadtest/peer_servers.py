"""The same checkpoint behind taskvec, behind vLLM's own server and behind infinity."""

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
"""vLLM takes up to a minute on two cores, more on a busy machine."""

LONGEST = 2048
"""Tokens of a text at most: vLLM keeps room for one of the longest, and that must fit."""


class Running(NamedTuple):
    """A server that is ready; ``pid`` of the first of its processes."""

    url: str
    pid: int


@contextmanager
def taskvec_server(model: str, room: Path) -> Iterator[Running]:
    """This project's, as it comes; the folder takes its log."""
    command = [sys.executable, "-m", "taskvec", "serve", "--model", model]
    with _running(command, "/health/ready", room / "taskvec.log") as server:
        yield server


@contextmanager
def vllm_server(python: Path, checkpoint: Checkpoint, room: Path) -> Iterator[Running]:
    """A stock vLLM server, by the command line that taskvec prints."""
    options = VllmOptions(memory_share=0.15, max_tokens=LONGEST)
    words = server_command(checkpoint, make_vllm_copy(checkpoint, room), options, gpu=False)
    # The CPU build's `vllm` command fails; its server module takes the same flags.
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", *words[2:]]
    command += ["--host", "127.0.0.1", "--disable-uvicorn-access-log"]
    environment = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with _running(command, "/health", room / "vllm.log", environment) as server:
        yield server


@contextmanager
def infinity_server(python: Path, checkpoint: Checkpoint, room: Path) -> Iterator[Running]:
    """An infinity server; it reads the layout of sentence-transformers, see merged.py."""
    command = [str(python.with_name("infinity_emb")), "v2", "--model-id", str(checkpoint.folder)]
    command += ["--served-model-name", checkpoint.card.name, "--url-prefix", "/v1"]
    command += ["--engine", "torch", "--device", "cpu", "--dtype", "bfloat16"]
    command += ["--host", "127.0.0.1", "--log-level", "error"]
    environment = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    with _running(command, "/health", room / "infinity.log", environment) as server:
        yield server


@contextmanager
def _running(
    command: Sequence[str], health: str, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[Running]:
    port = free_port()
    # Each is to choose its threads itself, as it does where nobody has set this.
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
            yield Running(f"http://127.0.0.1:{port}", process.pid)
        finally:
            process.terminate()


def installed(python: Path, package: str) -> str:
    """The version of a package in another environment."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run(
        [str(python), "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
