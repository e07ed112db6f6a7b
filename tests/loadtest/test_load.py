"""load.py against real servers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from conftest import repository

pytestmark = pytest.mark.full("the load tests, each in a short form")

SHORT = ["--seconds", "2", "--scenarios", "interactive", "--levels", "0.5", "--name", "-"]


def load(*options: str) -> subprocess.CompletedProcess[str]:
    """Run load.py for a few seconds."""
    command = [sys.executable, "loadtest/load.py", *SHORT, *options]
    return subprocess.run(
        command, cwd=repository(), capture_output=True, text=True, check=False, timeout=180
    )


def test_a_load_test_that_misses_a_threshold_fails_and_names_it() -> None:
    """A maximum p99 of one microsecond is missed: exit code 1 and a message with the level."""
    done = load("--p99", "0.001")
    assert done.returncode == 1, done.stderr
    assert "interactive at 0.50 of the capacity: the 99th percentile is" in done.stderr
    found = json.loads(done.stdout)
    (level,) = found["scenarios"]["interactive"]["levels"]
    assert set(level["outcomes"]) - {"429"} == {"200"}  # beside other tests, some are refused
    assert level["p50_ms"] > 0.001
    assert found["resident_megabytes"]["most"] > 100


def test_a_load_test_of_a_running_server_succeeds_if_all_thresholds_are_met(
    server_url: str,
) -> None:
    """With --url no server is started, and its memory is not measured."""
    done = load("--url", server_url, "--p99", "60000")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["broken"] == []
    assert found["resident_megabytes"] is None
