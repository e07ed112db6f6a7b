"""Logs on standard error: JSON, or columns if it is a terminal; never a text or an API key."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections import deque
from datetime import UTC, datetime
from typing import Any

import orjson
import structlog

log = structlog.get_logger(__name__)

MAX_LINES = 20_000
"""Maximum number of lines that wait to be written."""

MAX_BYTES = 8 << 20
"""Maximum size of the lines that wait, together: some 400 bytes for each of ``MAX_LINES``."""

FLUSH_INTERVAL = 0.05
"""Seconds between two writes."""

SHUTDOWN_TIMEOUT = 1.0
"""Seconds that an ending process waits for its last lines to be written."""


class LineWriter:
    """A file-like object that writes lines from a thread, so that a slow reader delays nothing.

    Lines are lost beyond ``MAX_LINES`` or ``MAX_BYTES``; a later line says how many were lost.
    """

    def __init__(self, descriptor: int) -> None:
        """Start the thread that writes to an open file descriptor."""
        self._descriptor = descriptor
        self._lines: deque[bytes] = deque()
        self._bytes = 0
        self._lost = 0
        self._lock = threading.Lock()
        self._flush_requested = threading.Event()
        self._written = threading.Event()
        threading.Thread(target=self._run, name="log-writer", daemon=True).start()

    def write(self, line: bytes) -> None:
        """Append a line to the buffer."""
        with self._lock:
            if len(self._lines) < MAX_LINES and self._bytes + len(line) <= MAX_BYTES:
                self._bytes += len(line)
                self._lines.append(line)
            else:
                self._lost += 1

    def flush(self) -> None:
        """Do nothing: structlog calls this after every line."""

    def finish(self) -> None:
        """Wait until all lines are written, or for ``SHUTDOWN_TIMEOUT`` seconds."""
        self._written.clear()
        self._flush_requested.set()
        self._written.wait(SHUTDOWN_TIMEOUT)

    def _run(self) -> None:
        while True:
            requested = self._flush_requested.wait(FLUSH_INTERVAL)
            self._flush_requested.clear()
            self._write_all()
            if lost := self._count_lost(0):
                self._count_lost(-lost)
                log.warning("log_lines_lost", lines=lost)
                self._write_all()
            if requested:
                self._written.set()

    def _count_lost(self, lines: int) -> int:
        with self._lock:
            self._lost += lines
            return self._lost

    def _write_all(self) -> None:
        while self._lines:
            lines = b"".join(self._lines.popleft() for _ in range(len(self._lines)))
            self._write(lines)
            with self._lock:
                self._bytes -= len(lines)  # lines that are being written take memory as well

    def _write(self, lines: bytes) -> None:
        remaining = memoryview(lines)
        try:
            while remaining:
                remaining = remaining[os.write(self._descriptor, remaining) :]
        except OSError:
            self._count_lost(
                bytes(remaining).count(b"\n")
            )  # the reader is gone, or the disk is full


class RequestLog:
    """Writes the access log: one line for each request, so it avoids structlog's overhead."""

    def __init__(self, writer: LineWriter | None = None) -> None:
        """Write to a writer of JSON lines.

        Args:
            writer: None if structlog must filter or format the lines (level, terminal).
        """
        self._writer = writer

    def write(self, line: dict[str, Any]) -> None:
        """Write the fields of one request as the event ``request``."""
        if self._writer is None:
            log.info("request", **line)
            return
        now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        record = {**line, "event": "request", "level": "info", "timestamp": now}
        self._writer.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))


def configure_logs(level: str) -> RequestLog:
    """Send structlog's events, and records of the standard library's logging, to standard error.

    ``logging.shutdown``, which Python calls at exit, flushes buffered lines.

    Args:
        level: ``debug``, ``info``, ``warning`` or ``error``.

    Returns:
        Log of requests, with the same level and format.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    writer = None
    if sys.stderr.isatty():
        structlog.configure(
            processors=[
                *shared,  # the default shows local variables, which contain texts
                structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback),
            ],
            wrapper_class=structlog.make_filtering_bound_logger(level),
            logger_factory=structlog.PrintLoggerFactory(sys.stderr),
            cache_logger_on_first_use=True,
        )
    else:
        writer = LineWriter(sys.stderr.fileno())
        structlog.configure(
            processors=[
                *shared,
                structlog.processors.format_exc_info,
                structlog.processors.JSONRenderer(serializer=orjson.dumps),
            ],
            wrapper_class=structlog.make_filtering_bound_logger(level),
            logger_factory=structlog.BytesLoggerFactory(writer),  # type: ignore[arg-type]
            cache_logger_on_first_use=True,
        )
    logging.basicConfig(handlers=[_ToStructlog(writer)], level=level.upper(), force=True)
    return RequestLog(writer if level in ("debug", "info") else None)


class _ToStructlog(logging.Handler):
    """Forwards standard log records to structlog, so that all logs have one format."""

    def __init__(self, writer: LineWriter | None) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        logger = structlog.get_logger(record.name)
        logger.log(
            record.levelno, record.getMessage(), logger=record.name, exc_info=record.exc_info
        )

    def close(self) -> None:
        """Flush the writer; logging calls this at exit, and when it is configured again."""
        super().close()
        if self._writer is not None:
            self._writer.finish()
