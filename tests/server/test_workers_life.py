"""The processes of ``--workers``: failed starts, early signals, and what is left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from processes import (
    EXACT,
    Served,
    command_of,
    connects,
    embed,
    ended,
    served,
    started,
    total,
    wait_for,
)

pytestmark = pytest.mark.full("failures, restarts and several processes of running servers")

WORKERS = ("--workers", "2", *EXACT)


def test_gateways_end_with_the_main_process() -> None:
    """After SIGKILL of the main process no gateway stays, and the port is free."""
    with served(*WORKERS) as server:
        embed(server.url, {"input": "before"})
        processes = server.descendants()
        assert len(server.gateways()) == 2
        server.process.kill()
        wait_for(lambda: not any(map(command_of, processes)), seconds=20)
        assert not connects(server.port)


def test_pings_start_no_threads() -> None:
    """The main process pings its gateways twice a second, for ever: a ping leaves nothing."""
    with served(*WORKERS) as server:
        for number in range(20):
            embed(server.url, {"input": f"text {number}"})

        def threads() -> int:
            return sum(len(list(Path(f"/proc/{p}/task").iterdir())) for p in server.gateways())

        before = threads()
        time.sleep(5)
        assert threads() <= before + 2


def answered(url: str) -> float:
    """Return the number of counted requests; a gateway counts one just after its answer."""
    return total(httpx.get(f"{url}/metrics").text, "taskvec_requests_total", 'status="200"')


def test_metrics_of_dead_gateways_leave_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gateways that die add their counts to one set of files; the counts stay."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with served(*WORKERS) as server:
        killed: set[int] = set()
        for number in range(3):
            embed(server.url, {"input": "text"})
            wait_for(lambda expected=number + 1: answered(server.url) == expected)
            gateway = min(server.gateways() - killed)
            os.kill(gateway, signal.SIGKILL)
            killed.add(gateway)
            wait_for(lambda: len(server.gateways() - killed) == 2)
        wait_for(lambda: not any(str(one) in names(tmp_path) for one in killed))
        embed(server.url, {"input": "text"})
        wait_for(lambda: answered(server.url) == 4)
        shown = httpx.get(f"{server.url}/metrics").text
        assert total(shown, "taskvec_requests_in_flight") == 0


def names(folder: Path) -> str:
    return " ".join(file.name for file in folder.glob("taskvec-*/series/*"))


def kill_starts(server: Served, serving: set[int], count: int) -> None:
    """Kill gateways before they serve, as often as given."""
    killed: set[int] = set()

    def kill_next() -> bool:
        for gateway in server.gateways() - serving - killed:
            if len(killed) < count:
                os.kill(gateway, signal.SIGKILL)
                killed.add(gateway)
        return len(killed) == count

    wait_for(kill_next)


def test_gateways_that_cannot_start_end_the_service() -> None:
    """After five starts in a row that fail: exit code 3, and how the last one ended."""
    server = Served("--workers", "2", "--log-level", "error", *EXACT[:2])
    kill_starts(server, set(), 5)
    code, errors = ended(server)
    assert code == 3, errors
    last = errors.splitlines()[-1]
    assert last.startswith("taskvec: ")
    assert "gateways in a row" in last
    assert "SIGKILL" in last
    assert errors.count("gateway_died") >= 5
    assert not connects(server.port)


def test_a_gateway_that_starts_at_last_is_enough() -> None:
    """Failed starts that are followed by one that serves are forgotten; requests are answered."""
    with served(*WORKERS) as server:
        for _ in range(2):
            wait_for(lambda: len(server.gateways()) == 2)
            first, second = sorted(server.gateways())
            os.kill(first, signal.SIGKILL)
            kill_starts(server, {first, second}, 3)
            assert embed(server.url, {"input": "by the other"}).status_code == 200
            wait_for(lambda other=second: len(server.gateways() - {other}) == 1)
            time.sleep(4)  # it imports, and is seen to serve
        assert server.process.poll() is None


def test_a_long_temporary_folder_ends_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder in which no socket can be is a sentence and exit code 3."""
    folder = tmp_path / ("x" * 90)
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    with started(*WORKERS) as server:
        code, errors = ended(server)
    assert code == 3
    assert "set TMPDIR to a shorter folder" in errors
    assert "Traceback" not in errors
    assert list(folder.iterdir()) == []


def test_a_full_temporary_folder_ends_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system without space for the metrics is a sentence and exit code 3."""
    mount, umount = shutil.which("mount"), shutil.which("umount")
    made = (
        mount
        and umount
        and subprocess.run(
            [mount, "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)],
            check=False,
            capture_output=True,
        )
    )
    if not made or made.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        with started(*WORKERS) as server:
            code, errors = ended(server)
        assert code == 3
        assert "free some space, or set TMPDIR" in errors
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run([str(umount), str(tmp_path)], check=True)


@pytest.mark.parametrize("seconds", [0.0, 0.4, 1.0])
def test_an_early_sigterm_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """SIGTERM soon after the temporary folder was made removes it, and ends every process."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with started(*WORKERS) as server:
        wait_for(lambda: any(tmp_path.glob("taskvec-*")))
        time.sleep(seconds)
        processes = server.descendants()
        server.process.terminate()
        code, errors = ended(server)
        assert code in {0, 143, -signal.SIGTERM}, errors
        wait_for(lambda: not any(map(command_of, processes)))
    assert list(tmp_path.glob("taskvec-*")) == []
