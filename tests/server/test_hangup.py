"""SIGHUP, which a closed terminal sends as well: files are read again, and nothing ends."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import httpx
import pytest

from conftest import wait_until
from keyfiles import entry
from processes import EXACT, Served, embed, started, wait_for

pytestmark = pytest.mark.full("failures, restarts and several processes of running servers")

SHAPES = {"in-process": ["--in-process"], "engine-process": [], "workers": ["--workers", "2"]}


def hang_up(server: Served) -> None:
    """Send SIGHUP to all processes, as the kernel does when a terminal is closed."""
    for process in (server.process.pid, *server.descendants()):
        os.kill(process, signal.SIGHUP)


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
def test_nothing_is_lost(options: list[str]) -> None:
    """Requests in progress are answered, and every process is still the same one."""
    with started(*options, *EXACT, "--max-queue-tokens", "10000000") as server:
        wait_until(f"{server.url}/health/ready", server.process)
        before = server.descendants()
        replies: list[httpx.Response] = []
        body = {"input": ["a text of several words " * 20] * 32}
        threads = [
            threading.Thread(target=lambda: replies.append(embed(server.url, body)))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for _ in range(5):
            hang_up(server)
        for thread in threads:
            thread.join()
        assert [reply.status_code for reply in replies] == [200] * 4
        assert server.descendants() == before
        assert server.process.poll() is None


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
def test_a_start_survives_it(options: list[str]) -> None:
    """A server whose terminal is closed while it loads is ready later."""
    with started(*options, *EXACT) as server:
        wait_for(lambda: "--port" in command(server) and listening_or_launched(server))
        for _ in range(5):
            hang_up(server)
        wait_until(f"{server.url}/health/ready", server.process)


def command(server: Served) -> str:
    """Return the command line of the main process."""
    return Path(f"/proc/{server.process.pid}/cmdline").read_text()


def listening_or_launched(server: Served) -> bool:
    """Return whether the main process ignores or handles SIGHUP by now."""
    fields = dict(
        line.split(":", 1)
        for line in Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    )
    bit = 1 << (signal.SIGHUP - 1)
    return bool((int(fields["SigIgn"], 16) | int(fields["SigCgt"], 16)) & bit)


@pytest.mark.parametrize("options", [SHAPES["in-process"], SHAPES["workers"]], ids=str)
def test_keys_are_read_again(tmp_path: Path, options: list[str]) -> None:
    """A new key works after the signal, in every process, and the log says that files were read."""
    file = tmp_path / "keys.toml"
    file.write_text(entry("old", "old"))
    more = ["--keys-file", str(file), "--log-level", "info"]
    with started(*options, *EXACT, *more) as server:
        wait_until(f"{server.url}/health/ready", server.process)
        stamp = file.stat()
        file.write_text(entry("new", "new"))
        os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # only the signal tells
        server.process.send_signal(signal.SIGHUP)

        def known() -> bool:
            statuses = {
                httpx.get(f"{server.url}/v1/models", headers={"api-key": "new"}).status_code
                for _ in range(8)
            }
            return statuses == {200}

        wait_for(known)
        server.process.terminate()
        errors = server.process.communicate(timeout=60)[1].decode()
    assert "reading_files_again" in errors
