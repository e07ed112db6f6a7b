"""Real vLLM servers, and the comparison of vectors with the reference."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from conftest import free_port
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.checkpoint.reference import reference_vectors
from taskvec.checkpoint.vllm_copy import make_vllm_copy
from taskvec.engines.base import TokenIds
from taskvec.engines.vllm.arguments import VllmOptions, server_command

START_SECONDS = 240.0
ENVIRONMENT = {
    **os.environ,
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}
LENGTHS = (1, 2, 7, 33, 150)


class VllmServer:
    """A stock vLLM OpenAI server, started with the command line that taskvec prints."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        cache: Path,
        core: int,
        lora_modules: Sequence[str] | None = None,
    ) -> None:
        folder = make_vllm_copy(checkpoint, cache)
        words = server_command(checkpoint, folder, VllmOptions(memory_share=0.15), gpu=False)
        if lora_modules is not None:
            words = [*words[: words.index("--lora-modules") + 1], *lora_modules]
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        # The `vllm` command of the CPU build does not work; the server module has the same flags.
        module = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
        address = ["--host", "127.0.0.1", "--port", str(self.port)]
        self._command = [*module, *words[2:], *address]
        # Two servers on the same cores are more than ten times slower.
        self._environment = {**ENVIRONMENT, "VLLM_CPU_OMP_THREADS_BIND": str(core)}
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the server object
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command,
            env=self._environment,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
            # In the same session: vLLM's worker waits by yielding its core, and the kernel yields
            # it only within the session. A second server did not finish its start otherwise.
            process_group=0,
        )

    def wait(self) -> None:
        limit = time.monotonic() + START_SECONDS
        while time.monotonic() < limit:
            assert self._process is not None
            if self._process.poll() is not None:
                raise AssertionError(self._log_tail())
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.2)
        raise AssertionError(f"no start in {START_SECONDS} s: {self._log_tail()}")

    def _log_tail(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-5000:]

    def kill(self) -> None:
        """Send SIGKILL to the server and its engine process."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def close(self) -> None:
        """Kill the server and close its log."""
        self.kill()
        self._log.close()


@contextmanager
def vllm_servers(*servers: VllmServer) -> Iterator[tuple[VllmServer, ...]]:
    """Start servers concurrently, wait for all, and kill them at the end."""
    with ExitStack() as stack:
        for server in servers:
            server.start()
            stack.callback(server.close)
        for server in servers:
            server.wait()
        yield servers


def mixed_batches(checkpoint: Checkpoint) -> list[tuple[str | None, list[TokenIds]]]:
    """Return texts of mixed lengths for each adapter."""
    random = np.random.default_rng(1)
    vocabulary = checkpoint.backbone.vocabulary
    return [
        (adapter, [random.integers(5, vocabulary, n, dtype=np.int32) for n in LENGTHS])
        for adapter in checkpoint.card.adapters
    ]


def cosines(
    checkpoint: Checkpoint, adapter: str | None, ids: Sequence[TokenIds], given: NDArray[Any]
) -> NDArray[np.float32]:
    """Return the cosine of each vector to the float32 reference."""
    truth = reference_vectors(checkpoint, ids, [adapter] * len(ids))
    return (unit(truth) * unit(given)).sum(axis=1)


def unit(vectors: NDArray[Any]) -> NDArray[Any]:
    """Return normalised vectors."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
