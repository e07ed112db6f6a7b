"""Log lines to stderr, never a text or a key: JSON, or columns where a person reads along."""

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

MOST_LINES = 20_000
"""Lines that wait to be written: some megabytes."""

PAUSE = 0.05
"""Seconds for which lines are collected before they are written."""

AT_THE_END = 1.0
"""Seconds that a process which ends waits for its last lines to be written."""


class LineWriter:
    """Writes lines from a thread, so that whoever reads them slowly, or not at all, delays nobody.

    Looks like a file to structlog. Beyond ``MOST_LINES`` lines are lost; a later line says how
    many.
    """

    def __init__(self, descriptor: int) -> None:
        """Write to an open file, which others may write to, too."""
        self._descriptor = descriptor
        self._lines: deque[bytes] = deque()
        self._lost = 0
        self._losing = threading.Lock()
        self._hurry = threading.Event()
        self._written = threading.Event()
        threading.Thread(target=self._work, name="log-writer", daemon=True).start()

    def write(self, line: bytes) -> None:
        """Take a line, to be written soon."""
        if len(self._lines) < MOST_LINES:
            self._lines.append(line)
        else:
            self._lose(1)

    def flush(self) -> None:
        """Nothing: structlog calls it after every line."""

    def finish(self) -> None:
        """Return when all lines are written, or after ``AT_THE_END`` seconds."""
        self._written.clear()
        self._hurry.set()
        self._written.wait(AT_THE_END)

    def _work(self) -> None:
        while True:
            asked = self._hurry.wait(PAUSE)
            self._hurry.clear()
            self._write_all()
            if lost := self._lose(0):
                self._lose(-lost)
                log.warning("log_lines_lost", lines=lost)
                self._write_all()
            if asked:
                self._written.set()

    def _lose(self, lines: int) -> int:
        with self._losing:
            self._lost += lines
            return self._lost

    def _write_all(self) -> None:
        while self._lines:
            self._write(b"".join(self._lines.popleft() for _ in range(len(self._lines))))

    def _write(self, lines: bytes) -> None:
        rest = memoryview(lines)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:
            self._lose(bytes(rest).count(b"\n"))  # nobody reads any more, or the disk is full


class RequestLog:
    """The lines of requests: one each, so they go by the shortest way."""

    writer: LineWriter | None = None
    """Where lines go as JSON; None where the level or a terminal wants structlog's way."""

    def write(self, line: dict[str, Any]) -> None:
        """Write what happened to one request, as the event ``request``."""
        if self.writer is None:
            log.info("request", **line)
            return
        now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        told = {**line, "event": "request", "level": "info", "timestamp": now}
        self.writer.write(orjson.dumps(told, option=orjson.OPT_APPEND_NEWLINE))


request_log = RequestLog()


def configure_logs(level: str) -> None:
    """Send structlog's events, and those of libraries that use logging, to stderr.

    ``logging.shutdown`` writes what still waits; Python calls it when it ends.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    writer = None
    if sys.stderr.isatty():
        structlog.configure(
            processors=[
                *shared,  # plain: the default shows local variables, which hold texts
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
    request_log.writer = writer if level in ("debug", "info") else None
    logging.basicConfig(handlers=[_ToStructlog(writer)], level=level.upper(), force=True)


class _ToStructlog(logging.Handler):
    """Hands standard log records on, so that there is one format."""

    def __init__(self, writer: LineWriter | None) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        logger = structlog.get_logger(record.name)
        logger.log(
            record.levelno, record.getMessage(), logger=record.name, exc_info=record.exc_info
        )

    def close(self) -> None:
        """As logging calls it at the end, and when it is configured anew."""
        super().close()
        if self._writer is not None:
            self._writer.finish()
