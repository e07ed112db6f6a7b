"""A keys file that changes takes effect; one that turned bad does not."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from keyfiles import entry
from taskvec.auth.keys import KeyLimits, KeySource, WatchedKeys


def watched(file: Path) -> tuple[WatchedKeys, list[frozenset[str]]]:
    seen: list[frozenset[str]] = []
    return WatchedKeys(KeySource(file, "env=env", KeyLimits()), seen.append), seen


def replace(file: Path, content: str) -> None:
    new = file.with_name("new")
    new.write_text(content)
    new.rename(file)


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    """New keys count and old ones do not; who wants the names is told once for each change."""
    file = tmp_path / "keys.toml"
    file.write_text(entry("a", "a"))
    keys, seen = watched(file)
    keys._look()
    replace(file, entry("b", "b"))
    keys._look()
    keys._look()
    assert keys.find(b"a") is None
    assert keys.find(b"b") is not None
    assert keys.find(b"env") is not None
    assert seen == [{"a", "env"}, {"b", "env"}]


def test_a_swapped_link_is_noticed(tmp_path: Path) -> None:
    """Kubernetes swaps a link to a folder: content of equal size and time counts as new."""
    for folder, name in (("1", "a"), ("2", "b")):
        (tmp_path / folder).mkdir()
        file = tmp_path / folder / "keys.toml"
        file.write_text(entry(name, name))
        os.utime(file, (1_000_000, 1_000_000))
    (tmp_path / "..data").symlink_to("1")
    (tmp_path / "keys.toml").symlink_to("..data/keys.toml")
    keys, _ = watched(tmp_path / "keys.toml")
    assert keys.find(b"a") is not None
    (tmp_path / "..new").symlink_to("2")
    (tmp_path / "..new").rename(tmp_path / "..data")
    keys._look()
    assert keys.find(b"a") is None
    assert keys.find(b"b") is not None


def test_a_file_that_turned_bad_keeps_the_old_keys(tmp_path: Path) -> None:
    """Bad or gone: one error that names the place, the old keys, and the new ones once cured."""
    file = tmp_path / "keys.toml"
    file.write_text(entry("a", "a"))
    keys, seen = watched(file)
    with capture_logs() as lines:
        replace(file, entry("b", "b") + "[[keys]]\nname = 'c'\n")
        keys._look()
        keys._look()
        assert keys.find(b"a") is not None
        file.unlink()
        keys._look()
        keys._look()
        assert keys.find(b"a") is not None
        replace(file, entry("b", "b"))
        keys._look()
    assert [(line["event"], line["log_level"]) for line in lines] == [
        ("keys_not_reloaded", "error"),
        ("keys_not_reloaded", "error"),
        ("keys_reloaded", "info"),
    ]
    assert "entry 2" in lines[0]["reason"]
    assert keys.find(b"a") is None
    assert len(seen) == 2


@pytest.mark.anyio
async def test_the_watch_looks_by_itself(tmp_path: Path) -> None:
    """While the watch runs, a change takes effect within seconds."""
    file = tmp_path / "keys.toml"
    file.write_text(entry("a", "a"))
    keys, _ = watched(file)
    task = asyncio.create_task(keys.watch())
    replace(file, entry("b", "b"))
    async with asyncio.timeout(20):
        while keys.find(b"b") is None:
            await asyncio.sleep(0.05)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
