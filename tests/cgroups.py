"""Folders with the files of memory and CPU cgroups, and of a process in them."""

from __future__ import annotations

from pathlib import Path

from taskvec.memory_limits import MemoryLimits

MB = 1 << 20
NO_LIMIT = 9223372036854771712
"""What version 1 writes where there is no limit."""


class Cgroup:
    """A process in a cgroup of version 2 with a limit; the tests decide what it uses."""

    def __init__(self, folder: Path, limit: int, used: int = 0) -> None:
        self._group = folder / "cgroups" / "pod"
        write_v2(self._group, str(limit), used, 0)
        self.limits = MemoryLimits(
            process_in(folder / "proc", "0::/pod"), folder / "cgroups", lambda: 0
        )

    def use(self, size: int, cache: int = 0) -> None:
        """Use ``size`` bytes from now on, and ``cache`` bytes of page cache besides."""
        write_v2(self._group, (self._group / "memory.max").read_text(), size + cache, cache)


def process_in(folder: Path, *lines: str) -> Path:
    """Make the folder of a process in /proc whose cgroups are ``lines``."""
    process = folder / "self"
    process.mkdir(parents=True)
    (process / "cgroup").write_text("".join(f"{line}\n" for line in lines))
    (process / "statm").write_text("1000 500 300 1 0 400 0\n")
    (folder / "meminfo").write_text("MemTotal:  4096000 kB\nMemAvailable: 2048000 kB\n")
    return process


def write_quota(group: Path, version: int, quota: int, period: int = 100_000) -> None:
    """Write the files of a CPU quota, in microseconds a period; -1 for none."""
    group.mkdir(parents=True, exist_ok=True)
    if version == 2:
        (group / "cpu.max").write_text(f"{'max' if quota < 0 else quota} {period}\n")
    else:
        (group / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (group / "cpu.cfs_period_us").write_text(f"{period}\n")


def write_v2(group: Path, limit: str, used: int, cache: int) -> None:
    """Write the files of a cgroup of version 2."""
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(f"{limit.strip()}\n")
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 1\nfile {cache}\ninactive_file {cache}\n")


def write_v1(group: Path, limit: int, used: int, cache: int) -> None:
    """Write the files of a cgroup of version 1; its statistics count children as ``total_``."""
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (group / "memory.usage_in_bytes").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"cache 7\ninactive_file 7\ntotal_inactive_file {cache}\n")
