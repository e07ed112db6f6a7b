"""Real vLLM servers, and the vectors that every engine must give."""

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
    """A stock vLLM OpenAI server, started by the command line that taskvec prints for it."""

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
        # The CPU build has no `vllm` command that works; its server module takes the same flags.
        module = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
        place = ["--host", "127.0.0.1", "--port", str(self.port)]
        self._command = [*module, *words[2:], *place]
        # Two servers that share cores slow each other down more than tenfold.
        self._environment = {**ENVIRONMENT, "VLLM_CPU_OMP_THREADS_BIND": str(core)}
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the server object
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command,
            env=self._environment,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
            # Not a session of its own: vLLM's worker waits by yielding its core, and the kernel
            # lets it yield only to its session. A server that started beside it stood still.
            process_group=0,
        )

    def wait(self) -> None:
        limit = time.monotonic() + START_SECONDS
        while time.monotonic() < limit:
            assert self._process is not None
            if self._process.poll() is not None:
                raise AssertionError(self._complaint())
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.2)
        raise AssertionError(f"no start in {START_SECONDS} s: {self._complaint()}")

    def _complaint(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-5000:]

    def kill(self) -> None:
        """SIGKILL, to it and its engine process."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def close(self) -> None:
        """The end of it."""
        self.kill()
        self._log.close()


@contextmanager
def vllm_servers(*servers: VllmServer) -> Iterator[tuple[VllmServer, ...]]:
    """Start them side by side, wait for all, kill them at the end."""
    with ExitStack() as stack:
        for server in servers:
            server.start()
            stack.callback(server.close)
        for server in servers:
            server.wait()
        yield servers


def mixed_batches(checkpoint: Checkpoint) -> list[tuple[str | None, list[TokenIds]]]:
    """For each adapter, texts of mixed lengths."""
    random = np.random.default_rng(1)
    vocabulary = checkpoint.backbone.vocabulary
    return [
        (adapter, [random.integers(5, vocabulary, n, dtype=np.int32) for n in LENGTHS])
        for adapter in checkpoint.card.adapters
    ]


def cosines(
    checkpoint: Checkpoint, adapter: str | None, ids: Sequence[TokenIds], given: NDArray[Any]
) -> NDArray[np.float32]:
    """Of each vector to the float32 reference, which the oracle's tests hold."""
    truth = reference_vectors(checkpoint, ids, [adapter] * len(ids))
    return (unit(truth) * unit(given)).sum(axis=1)


def unit(vectors: NDArray[Any]) -> NDArray[Any]:
    """Rows of length 1."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
