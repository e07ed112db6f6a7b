"""The limits on this process's memory, and how much of each is used.

Limits are those of the control groups that contain the process (version 1 and 2, each level of the
hierarchy), and of its address space (``ulimit -v``). A cgroup's use is its *working set*: without
the page cache that the kernel would reclaim before it kills a process. Of the address space, what
malloc has free does not count.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from taskvec.cgroups import CGROUPS, PROC, groups_of
from taskvec.malloc import free_heap_bytes

UNLIMITED = 1 << 60
"""Bytes from which a limit does not limit anything: without a limit, version 1 reports the largest
number of pages."""


class MemoryUse(NamedTuple):
    """One limit, and what is used of it.

    Attributes:
        name: what has the limit: a file, or ``ulimit -v``.
        limit: bytes.
        used: bytes.
    """

    name: str
    limit: int
    used: int

    @property
    def free(self) -> int:
        """Bytes below the limit."""
        return max(0, self.limit - self.used)


class _Files(NamedTuple):
    """Names of a cgroup version's files, and of a field."""

    limit: str
    used: str
    cache: bytes


V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", b"total_inactive_file")
V2 = _Files("memory.max", "memory.current", b"inactive_file")


class MemoryLimits:
    """Reads the limits that apply to this process; takes some ten microseconds a limit."""

    def __init__(
        self,
        proc: Path = PROC,
        cgroups: Path = CGROUPS,
        free_heap_bytes: Callable[[], int] = free_heap_bytes,
    ) -> None:
        """Find the cgroups of the process.

        Args:
            proc: the process's folder in /proc.
            cgroups: where the cgroup hierarchies are mounted.
            free_heap_bytes: bytes of address space that the allocator can use again.
        """
        self._free_heap_bytes = free_heap_bytes
        self._proc = proc
        self._groups = list(_groups(proc, cgroups))

    def read(self) -> list[MemoryUse]:
        """Return every limit in force; limits that changed meanwhile are seen."""
        uses = [_read_group(folder, files) for folder, files in self._groups]
        return [use for use in (*uses, self.address_space()) if use is not None]

    def tightest(self) -> MemoryUse | None:
        """Return the limit with the least room; None if there is none."""
        return min(self.read(), key=lambda use: use.free, default=None)

    def total(self) -> int:
        """Return the bytes that the process may have: its smallest limit, or the machine's memory.

        0 if neither is known.
        """
        limits = [use.limit for use in self.read()]
        machine = _machine_memory(self._proc)
        return min([*limits, machine] if machine else limits, default=0)

    def address_space(self) -> MemoryUse | None:
        """Return the limit of the address space and its use; None if there is none.

        It is a limit of each process, unlike those of cgroups.
        """
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit == resource.RLIM_INFINITY or limit >= UNLIMITED:
            return None
        try:
            pages = int((self._proc / "statm").read_bytes().split()[0])
        except (OSError, ValueError, IndexError):
            return None
        # malloc returns little address space to the system, and uses it again.
        used = pages * resource.getpagesize() - self._free_heap_bytes()
        return MemoryUse("ulimit -v", limit, max(0, used))


def _groups(proc: Path, cgroups: Path) -> Iterator[tuple[Path, _Files]]:
    for group in groups_of("memory", proc, cgroups):
        files = V2 if group.version == 2 else V1
        if (group.folder / files.limit).is_file():
            yield group.folder, files


def _read_group(folder: Path, files: _Files) -> MemoryUse | None:
    try:
        text = (folder / files.limit).read_bytes().strip()
        limit = UNLIMITED if text == b"max" else int(text)
        if limit >= UNLIMITED:
            return None
        used = int((folder / files.used).read_bytes())
        for line in (folder / "memory.stat").read_bytes().splitlines():
            name, _, value = line.partition(b" ")
            if name == files.cache:
                used -= int(value)
                break
    except (OSError, ValueError):  # the group is gone, or its files are not readable
        return None
    return MemoryUse(str(folder / files.limit), limit, max(0, used))


def _machine_memory(proc: Path) -> int:
    try:
        first = (proc.parent / "meminfo").read_text().partition("\n")[0]
        return int(first.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return 0
