"""The open files of this process: who may use how many, and what to do when none is left."""

from __future__ import annotations

import errno
import resource
import time
from typing import NamedTuple

import structlog

OTHER_FILES = 128
"""Open files besides connections of clients and to engine servers: weights, pipes, Redis, and
``MIN_CONNECTING`` connections that are being accepted."""

MIN_CONNECTING, MAX_CONNECTING = 64, 256
"""Number of connections that may be accepted and not yet set up, where few and where many files may
be open. Connections that are evicted for them give their files back only then."""

MAX_ENGINE_CONNECTIONS = 512
"""Maximum connections of one process to engine servers."""

MIN_ENGINE_CONNECTIONS = 8
"""Connections to engine servers even under the smallest limit of open files."""

FILE_RETRY_SECONDS = 0.05
"""Pause after which something that needs an open file is tried again."""

WARN_INTERVAL = 10.0
"""Seconds between two warnings about a lack of open files."""

log = structlog.get_logger(__name__)

_warned_at = -WARN_INTERVAL


class FileShares(NamedTuple):
    """Open files of one process.

    Attributes:
        clients: connections of clients.
        engines: connections to engine servers.
        connecting: connections of clients, in addition, that are accepted and not yet set up.
    """

    clients: int
    engines: int
    connecting: int


def divide_open_files(connections: int, *, remote: bool) -> FileShares:
    """Divide the open files that this process may have; raises its soft limit.

    Connections to engine servers have a share of their own: without it, clients that fill every
    slot leave none for the calls that would answer them.

    Args:
        connections: maximum connections of clients.
        remote: whether the process calls engine servers.
    """
    engines = MAX_ENGINE_CONNECTIONS if remote else 0
    more_connecting = MAX_CONNECTING - MIN_CONNECTING
    allowed = _raise_soft_limit(connections + engines + OTHER_FILES + more_connecting)
    available = max(1, allowed - OTHER_FILES)
    spare = available - connections - engines
    if spare >= 0:
        connecting = MIN_CONNECTING + min(spare, more_connecting)
        return FileShares(connections, engines, connecting)
    engines = min(engines, max(MIN_ENGINE_CONNECTIONS, available // 4))
    clients = max(1, min(connections, available - engines))
    return FileShares(clients, engines, MIN_CONNECTING)


def out_of_files(error: BaseException | None) -> bool:
    """Return whether a connection failed because this process, or the system, has no file left.

    Libraries wrap the system's error, so the chain of causes is searched. Logs a warning at
    intervals.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            _warn()
            return True
        error = error.__cause__ or error.__context__
    return False


def _warn() -> None:
    global _warned_at  # noqa: PLW0603 - the files are the process's, and so is the interval
    now = time.monotonic()
    if now - _warned_at >= WARN_INTERVAL:
        _warned_at = now
        log.warning(
            "out_of_files",
            limit=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            remedy="raise the limit of open files (ulimit -n), or lower --max-connections",
        )


def _raise_soft_limit(wanted: int) -> int:
    """Raise the soft limit of open files to ``wanted`` if possible; return how many are allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft
