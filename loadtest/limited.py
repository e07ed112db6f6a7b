"""Limit the memory of a server that a load test starts: its address space, or a cgroup."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
REMOVE_SECONDS = 10.0
"""Time in which the last process of a cgroup must have ended."""


@contextmanager
def limited_memory(
    address_space: int | None = None, cgroup: int | None = None
) -> Iterator[Callable[[], None]]:
    """Make the limits, and remove them afterwards.

    Args:
        address_space: megabytes of ``ulimit -v``; None for no limit.
        cgroup: megabytes of a memory cgroup; None for no limit.

    Yields:
        A function that puts the current process under the limits: ``preexec_fn`` of ``Popen``.

    Raises:
        SystemExit: no cgroup can be made here; says why.
    """
    group = None if cgroup is None else _make_cgroup(cgroup)

    def enter() -> None:
        if address_space is not None:
            size = address_space << 20
            resource.setrlimit(resource.RLIMIT_AS, (size, size))
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    try:
        yield enter
    finally:
        if group is not None:
            _remove(group)


def _make_cgroup(megabytes: int) -> Path:
    """Make a cgroup with a memory limit: version 1 or 2, below the own one or at the root."""
    reasons = []
    for parent, limit in _parents():
        group = parent / f"taskvec-{os.getpid()}"
        try:
            group.mkdir()
            (group / limit).write_text(str(megabytes << 20))
        except OSError as error:
            reasons.append(f"{group}: {error.strerror}")
            if group.is_dir():
                group.rmdir()
            continue
        return group
    raise SystemExit(
        "No memory cgroup can be made here: run as root on a machine with a writable hierarchy "
        f"below {CGROUPS}, or use --address-space. Tried: {'; '.join(reasons) or 'none found'}."
    )


def _parents() -> Iterator[tuple[Path, str]]:
    """Yield folders in which a cgroup may be made, and the file of its limit."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            root, limit = CGROUPS / "memory", "memory.limit_in_bytes"
        elif number == "0":
            root, limit = CGROUPS, "memory.max"
        else:
            continue
        for folder in (root / path.lstrip("/"), root):
            if (folder / "cgroup.procs").is_file():
                yield folder, limit


def _remove(group: Path) -> None:
    until = time.monotonic() + REMOVE_SECONDS
    while True:
        try:
            group.rmdir()
        except OSError:  # the server's memory is still being freed
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
        else:
            return
