"""The control groups (cgroups) that contain this process, and its share of the processor cores.

Both versions are read: version 2 has one hierarchy, version 1 one for each controller. A limit may
be set at every level of a hierarchy, and the tightest one holds.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc/self")
CGROUPS = Path("/sys/fs/cgroup")


class Group(NamedTuple):
    """One control group.

    Attributes:
        folder: has the files of the group.
        version: of the hierarchy, 1 or 2.
    """

    folder: Path
    version: int


def groups_of(controller: str, proc: Path = PROC, cgroups: Path = CGROUPS) -> Iterator[Group]:
    """Yield the groups that limit this process: its own, then those around it.

    In a container the path in /proc may be that of the host, where the folder is not visible; the
    container's own group is then at the root of the hierarchy.

    Args:
        controller: ``memory`` or ``cpu``.
        proc: the process's folder in /proc.
        cgroups: where the hierarchies are mounted.
    """
    try:
        lines = (proc / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            roots, version = [cgroups], 2
        elif controller in controllers.split(","):
            # Mounted under all its controllers, ``cpu,cpuacct``, with a link for each; or only one.
            roots, version = [cgroups / controllers, cgroups / controller], 1
        else:
            continue
        root = next((root for root in roots if root.is_dir()), None)
        if root is None:
            continue
        relative = Path(path.lstrip("/"))
        for folder in (relative, *relative.parents):
            if ".." not in folder.parts and (root / folder).is_dir():
                yield Group(root / folder, version)


def available_cores(
    proc: Path = PROC, cgroups: Path = CGROUPS, allowed: Callable[[], int] | None = None
) -> int:
    """Return how many cores this process can keep busy, at least 1.

    The cores that it may run on, and the quotas of its groups: of 1.5 cores only one is always
    there, and a second thread would stop all of them for a part of each period.

    Args:
        proc: the process's folder in /proc.
        cgroups: where the hierarchies are mounted.
        allowed: counts the cores that the process may run on; None asks the system.
    """
    quotas = [_quota(group) for group in groups_of("cpu", proc, cgroups)]
    return max(1, math.floor(min([(allowed or _allowed_cores)(), *quotas])))


def has_quota(proc: Path = PROC, cgroups: Path = CGROUPS) -> bool:
    """Return whether the processor time of this process is limited."""
    return any(math.isfinite(_quota(group)) for group in groups_of("cpu", proc, cgroups))


def _allowed_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # a system without affinity


def _quota(group: Group) -> float:
    """Return the quota of a group in cores; infinite without one."""
    try:
        if group.version == 2:
            quota, period = (group.folder / "cpu.max").read_text().split()
        else:
            quota = (group.folder / "cpu.cfs_quota_us").read_text().strip()
            period = (group.folder / "cpu.cfs_period_us").read_text()
        if quota == "max" or int(quota) <= 0:  # version 1 writes -1 for none
            return math.inf
        return int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # the group is gone, or its files unreadable
        return math.inf
