"""Servers and caches that several tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from taskvec.checkpoint.checkpoint import Checkpoint
from vllm_servers import ENVIRONMENT, VllmServer, vllm_servers

os.environ |= ENVIRONMENT


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cache of golden vectors and copies for vLLM, shared by all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def two_servers(default_checkpoint: Checkpoint, cache: Path) -> Iterator[tuple[VllmServer, ...]]:
    """Two servers of the default model with all adapters."""
    servers = tuple(VllmServer(default_checkpoint, cache, core) for core in range(2))
    with vllm_servers(*servers):
        yield servers
