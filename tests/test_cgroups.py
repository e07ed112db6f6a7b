"""The cores of a process: affinity, and quotas of both versions of cgroups at every level."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cgroups import process_in, write_quota
from taskvec.cgroups import available_cores, groups_of, has_quota

V1_LINES = ("4:cpu,cpuacct:/pod/box", "3:memory:/other", "0::/")
V2_LINES = ("0::/pod/box",)


def machine(folder: Path, version: int, root: str = "cpu,cpuacct") -> Path:
    """Return the root of the hierarchy in which a process in /pod/box has its quota."""
    process_in(folder / "proc", *(V1_LINES if version == 1 else V2_LINES))
    cgroups = folder / "cgroups"
    return cgroups / root if version == 1 else cgroups


def cores(folder: Path) -> int:
    """Return the cores of that process on a machine with eight."""
    return available_cores(folder / "proc" / "self", folder / "cgroups", lambda: 8)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("quota", "expected"),
    [(-1, 8), (100_000, 1), (150_000, 1), (199_999, 1), (200_000, 2), (50_000, 1), (1_600_000, 8)],
)
def test_a_quota_limits_the_cores(tmp_path: Path, version: int, quota: int, expected: int) -> None:
    """Only whole cores count: 1.5 is one. Less than one is one, and more than there are is all."""
    write_quota(machine(tmp_path, version) / "pod/box", version, quota)
    assert cores(tmp_path) == expected
    assert has_quota(tmp_path / "proc" / "self", tmp_path / "cgroups") == (quota > 0)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("level", ["pod/box", "pod", "."])
def test_the_tightest_level_counts(tmp_path: Path, version: int, level: str) -> None:
    """A quota of a group around the process's own holds for it as well."""
    root = machine(tmp_path, version)
    for group in ("pod/box", "pod", "."):
        write_quota(root / group, version, 300_000 if group == level else 500_000)
    assert cores(tmp_path) == 3


@pytest.mark.parametrize("root", ["cpu", "cpu,cpuacct"])
def test_a_container_of_version_1(tmp_path: Path, root: str) -> None:
    """Its own group is at the root of the hierarchy, which has either name."""
    write_quota(machine(tmp_path, 1, root), 1, 200_000)
    assert cores(tmp_path) == 2


def test_another_period(tmp_path: Path) -> None:
    """A quota is relative to its period."""
    write_quota(machine(tmp_path, 2) / "pod/box", 2, 30_000, period=10_000)
    assert cores(tmp_path) == 3


@pytest.mark.parametrize("content", ["", "max", "lots 100000", "100000 0", "a b c"])
def test_what_cannot_be_read_limits_nothing(tmp_path: Path, content: str) -> None:
    """A file in an unknown form is passed over."""
    write_quota(machine(tmp_path, 2) / "pod/box", 2, 100_000)
    (tmp_path / "cgroups/pod/box/cpu.max").write_text(content)
    assert cores(tmp_path) == 8


def test_the_affinity_limits_the_cores(tmp_path: Path) -> None:
    """A process that may run on one core has one, and without cgroups nothing else counts."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert available_cores(tmp_path, tmp_path) == 1
    finally:
        os.sched_setaffinity(0, before)
    assert available_cores(tmp_path, tmp_path) == len(before)


def test_a_path_that_leads_out_is_not_followed(tmp_path: Path) -> None:
    """``..`` in the path of a group, which a process outside of a namespace has, is passed over."""
    process_in(tmp_path / "proc", "0::/../sibling")
    (tmp_path / "sibling").mkdir()
    (tmp_path / "cgroups").mkdir()
    groups = list(groups_of("cpu", tmp_path / "proc" / "self", tmp_path / "cgroups"))
    assert [group.folder for group in groups] == [tmp_path / "cgroups"]
