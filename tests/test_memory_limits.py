"""Limits of a process's memory: cgroups of both versions at every level, and the address space."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cgroups import MB, NO_LIMIT, process_in, write_v1, write_v2
from taskvec.memory_limits import MemoryLimits, MemoryUse


def reader(folder: Path) -> MemoryLimits:
    """Read the limits in a folder made by ``process_in`` and the writers."""
    return MemoryLimits(folder / "proc" / "self", folder / "cgroups", lambda: 0)


def test_version_2_counts_the_working_set(tmp_path: Path) -> None:
    """Page cache that can be reclaimed is not used memory."""
    process_in(tmp_path / "proc", "0::/kubepods/pod7/box")
    write_v2(tmp_path / "cgroups/kubepods/pod7/box", str(100 * MB), 90 * MB, 30 * MB)
    (use,) = reader(tmp_path).read()
    assert (use.limit, use.used, use.free) == (100 * MB, 60 * MB, 40 * MB)
    assert use.name.endswith("kubepods/pod7/box/memory.max")


def test_version_1_counts_the_children(tmp_path: Path) -> None:
    """The page cache of the whole subtree is subtracted, as the use is that of the subtree."""
    process_in(tmp_path / "proc", "4:cpu,cpuacct:/other", "3:memory:/docker/a", "0::/")
    write_v1(tmp_path / "cgroups/memory/docker/a", 200 * MB, 120 * MB, 20 * MB)
    (use,) = reader(tmp_path).read()
    assert (use.limit, use.used) == (200 * MB, 100 * MB)


@pytest.mark.parametrize("version", [1, 2])
def test_the_level_with_the_least_room_counts(tmp_path: Path, version: int) -> None:
    """A limit on a group around the process's own is one as well; an absent limit is none."""
    if version == 1:
        process_in(tmp_path / "proc", "9:memory:/pod/box")
        write_v1(tmp_path / "cgroups/memory/pod/box", 100 * MB, 10 * MB, 0)
        write_v1(tmp_path / "cgroups/memory/pod", 300 * MB, 280 * MB, 0)
        write_v1(tmp_path / "cgroups/memory", NO_LIMIT, 900 * MB, 0)
    else:
        process_in(tmp_path / "proc", "0::/pod/box")
        write_v2(tmp_path / "cgroups/pod/box", str(100 * MB), 10 * MB, 0)
        write_v2(tmp_path / "cgroups/pod", str(300 * MB), 280 * MB, 0)
        write_v2(tmp_path / "cgroups", "max", 900 * MB, 0)
    limits = reader(tmp_path)
    assert sorted(use.limit for use in limits.read()) == [100 * MB, 300 * MB]
    tightest = limits.tightest()
    assert tightest is not None
    assert (tightest.limit, tightest.free) == (300 * MB, 20 * MB)
    assert limits.total() == 100 * MB


def test_a_container_sees_its_own_group_at_the_root(tmp_path: Path) -> None:
    """Where the path in /proc is the host's and not mounted, the root of the hierarchy counts."""
    process_in(tmp_path / "proc", "5:memory:/docker/0123456789")
    write_v1(tmp_path / "cgroups/memory", 64 * MB, 32 * MB, 0)
    tightest = reader(tmp_path).tightest()
    assert tightest is not None
    assert (tightest.limit, tightest.used) == (64 * MB, 32 * MB)


def test_a_limit_that_changes_is_seen(tmp_path: Path) -> None:
    """An orchestrator may resize a container that runs."""
    process_in(tmp_path / "proc", "0::/box")
    write_v2(tmp_path / "cgroups/box", "max", 32 * MB, 0)
    limits = reader(tmp_path)
    assert limits.tightest() is None
    write_v2(tmp_path / "cgroups/box", str(40 * MB), 32 * MB, 0)
    tightest = limits.tightest()
    assert tightest is not None
    assert tightest.free == 8 * MB


@pytest.mark.parametrize("damage", ["no proc", "no group", "no statistics", "no number"])
def test_what_cannot_be_read_is_no_limit(tmp_path: Path, damage: str) -> None:
    """A system without these files, or whose files go away, has no limit; nothing is raised."""
    if damage != "no proc":
        process_in(tmp_path / "proc", "0::/box", "garbage")
    if damage not in ("no proc", "no group"):
        write_v2(tmp_path / "cgroups/box", str(40 * MB), 32 * MB, 0)
    limits = reader(tmp_path)
    if damage == "no statistics":
        (tmp_path / "cgroups/box/memory.stat").unlink()
    if damage == "no number":
        (tmp_path / "cgroups/box/memory.current").write_text("")
    assert limits.read() == []
    assert limits.total() == (0 if damage == "no proc" else 4096000 * 1024)


def test_use_beyond_a_limit_leaves_nothing() -> None:
    """Free memory is never negative."""
    assert MemoryUse("x", 10, 15).free == 0


ADDRESS_SPACE = """
import json, resource, sys
from pathlib import Path
from taskvec.memory_limits import MemoryLimits
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
limits = MemoryLimits(cgroups=Path("/nowhere"))
before = limits.tightest()
large = bytearray(256 << 20)
held = limits.tightest()
small = [bytearray(30_000) for _ in range(10_000)]
kept = small[::100]
del small
freed = limits.tightest()
print(json.dumps([before, held, freed]))
"""


def test_the_address_space_is_a_limit() -> None:
    """Under ``ulimit -v`` the mapped address space counts, without what malloc has free."""
    run = subprocess.run(
        [sys.executable, "-c", ADDRESS_SPACE], capture_output=True, text=True, check=True
    )
    before, held, freed = (MemoryUse(*use) for use in json.loads(run.stdout))
    assert before.name == "ulimit -v"
    assert before.limit == 4 << 30
    assert 0 < before.used < 1 << 30
    assert held.used - before.used >= 256 << 20
    # 300 MB were used meanwhile; a hundredth of the blocks keeps the heap as large as it was.
    assert freed.used - held.used < 60 << 20
