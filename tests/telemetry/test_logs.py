"""Logs as a collector reads them: one JSON object a line, on standard error."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

import pytest

from taskvec.telemetry.logs import MAX_BYTES, MAX_LINES

LEVELS = ("debug", "info", "warning", "error")

HEAD = """
import logging, structlog
from taskvec.telemetry.logs import configure_logs
configure_logs({!r})
"""


def test_an_event_is_one_json_object() -> None:
    """An event carries its fields, its level and an ISO time in UTC."""
    before = datetime.now(UTC)
    (line,) = logged("structlog.get_logger('x').info('loaded', model='m', texts=3, task=None)")
    stamp = datetime.fromisoformat(line.pop("timestamp"))
    assert line == {"event": "loaded", "level": "info", "model": "m", "texts": 3, "task": None}
    assert stamp.utcoffset() is not None
    assert before <= stamp <= datetime.now(UTC)


def test_nothing_is_written_to_standard_output() -> None:
    """Standard output has only what a command prints."""
    done = run("structlog.get_logger().error('to stderr'); logging.error('this too')")
    assert done.stdout == b""
    assert done.stderr.count(b"\n") == 2


@pytest.mark.parametrize("level", LEVELS)
def test_the_level_is_honoured(level: str) -> None:
    """Events below the level are left out, of structlog and of the standard library."""
    code = "\n".join(
        f"structlog.get_logger().{name}('ours {name}')\nlogging.getLogger('lib').{name}('{name}')"
        for name in LEVELS
    )
    events = [line["event"] for line in logged(code, level)]
    kept = LEVELS[LEVELS.index(level) :]
    assert events == [event for name in kept for event in (f"ours {name}", name)]


def test_an_exception_is_in_the_line() -> None:
    """log.exception writes the traceback into a field of the same line."""
    (line,) = logged(
        "try:\n    {}['lost']\nexcept KeyError:\n"
        "    structlog.get_logger().exception('unhandled_error', request_id='r-1')"
    )
    assert line["event"] == "unhandled_error"
    assert line["request_id"] == "r-1"
    assert line["level"] == "error"
    assert "Traceback" in line["exception"]
    assert "KeyError: 'lost'" in line["exception"]


def test_other_libraries_have_the_same_format() -> None:
    """A record of the standard library becomes a line of the same format, with its logger."""
    (line,) = logged("logging.getLogger('uvicorn.error').warning('closing %d of %s', 3, 'them')")
    assert line["event"] == "closing 3 of them"
    assert line["level"] == "warning"
    assert line["logger"] == "uvicorn.error"
    assert "timestamp" in line


def test_an_exception_of_another_library_is_in_the_line() -> None:
    """A traceback in a record of the standard library is kept."""
    (line,) = logged(
        "try:\n    1 / 0\nexcept ZeroDivisionError:\n    logging.getLogger('lib').exception('no')"
    )
    assert line["event"] == "no"
    assert "ZeroDivisionError" in line["exception"]


def test_a_percent_sign_in_a_message_stays() -> None:
    """The message of a standard record is formatted only once."""
    (line,) = logged("logging.getLogger('lib').info('%s', '100 %s {done} %d')")
    assert line["event"] == "100 %s {done} %d"


def test_a_line_break_does_not_split_a_line() -> None:
    """An event with line breaks in its values stays one line."""
    (line,) = logged("structlog.get_logger().info('a\\nb', id='c\\r\\nd', name='é\\u2028')")
    assert (line["event"], line["id"], line["name"]) == ("a\nb", "c\r\nd", "é\u2028")


def test_configuring_twice_writes_once() -> None:
    """A second call replaces the first: lines are not doubled, and the new level applies."""
    lines = logged(
        "configure_logs('warning')\nlogging.warning('once')\nlogging.info('never')", "info"
    )
    assert [line["event"] for line in lines] == ["once"]


def test_a_stalled_reader_does_not_block_the_process() -> None:
    """The process continues if its lines are not read, and counts the lines that it drops."""
    lines = 3 * MAX_LINES
    code = (
        f"for n in range({lines}):\n    structlog.get_logger().info('x' * 20, n=n)\n"
        "print('done', flush=True)\n"
    )
    command = [sys.executable, "-c", HEAD.format("info") + code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"done\n"
        _, written = process.communicate(timeout=60)
    assert process.returncode == 0
    records = [json.loads(line) for line in written.splitlines()]
    numbers = [line["n"] for line in records if "n" in line]
    assert numbers == sorted(numbers)
    assert len(numbers) >= MAX_LINES
    lost = sum(line["lines"] for line in records if line["event"] == "log_lines_lost")
    assert lost + len(numbers) == lines
    assert lost > 0


def test_long_lines_are_bounded_in_bytes() -> None:
    """If they are not read, lines of 60 kB are dropped long before there are 20,000 of them."""
    code = (
        "for n in range(1000):\n    structlog.get_logger().info('x' * 60_000, n=n)\n"
        "print('done', flush=True)\n"
    )
    command = [sys.executable, "-c", HEAD.format("info") + code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"done\n"
        _, written = process.communicate(timeout=60)
    assert MAX_BYTES - 70_000 < len(written) < MAX_BYTES + 70_000
    records = [json.loads(line) for line in written.splitlines()]
    lost = sum(line["lines"] for line in records if line["event"] == "log_lines_lost")
    assert lost + sum("n" in line for line in records) == 1000


def test_a_closed_reader_does_not_stop_the_process() -> None:
    """The process continues after the reader of its lines has ended."""
    code = "import time\nfor _ in range(5):\n    logging.error('x')\n    time.sleep(0.1)"
    command = [sys.executable, "-c", HEAD.format("info") + code]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        assert process.stderr
        process.stderr.close()
        assert process.wait(60) == 0


def logged(code: str, level: str = "info") -> list[dict[str, Any]]:
    """Return the parsed lines that code writes to standard error."""
    return [json.loads(line) for line in run(code, level).stderr.split(b"\n") if line]


def run(code: str, level: str = "info") -> subprocess.CompletedProcess[bytes]:
    """Run code in a new process with configured logs."""
    command = [sys.executable, "-c", HEAD.format(level) + code]
    return subprocess.run(command, capture_output=True, check=True, timeout=60)
