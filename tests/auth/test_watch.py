"""A changed keys file takes effect, unless it is invalid."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from keyfiles import entry
from taskvec.auth.keys import KeyLimits, KeySource, WatchedKeys
from taskvec.errors import StartError


def watched(file: Path) -> tuple[WatchedKeys, list[frozenset[str]]]:
    seen: list[frozenset[str]] = []
    return WatchedKeys(KeySource(file, "env=env", KeyLimits()), seen.append), seen


def replace(file: Path, content: str) -> None:
    new = file.with_name("new")
    new.write_text(content)
    new.rename(file)


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    """New keys are found and removed ones are not; on_change is called once per change."""
    file = tmp_path / "keys.toml"
    file.write_text(entry("a", "a"))
    keys, seen = watched(file)
    keys.reload()
    replace(file, entry("b", "b"))
    keys.reload()
    keys.reload()
    assert keys.find(b"a") is None
    assert keys.find(b"b") is not None
    assert keys.find(b"env") is not None
    assert seen == [{"a", "env"}, {"b", "env"}]


def test_a_swapped_link_is_noticed(tmp_path: Path) -> None:
    """A swapped link to a folder, as in Kubernetes, counts even with equal size and time."""
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
    keys.reload()
    assert keys.find(b"a") is None
    assert keys.find(b"b") is not None


def test_an_invalid_file_keeps_the_old_keys(tmp_path: Path) -> None:
    """An invalid or missing file is logged once and keeps the old keys until it is repaired."""
    file = tmp_path / "keys.toml"
    file.write_text(entry("a", "a"))
    keys, seen = watched(file)
    with capture_logs() as lines:
        replace(file, entry("b", "b") + "[[keys]]\nname = 'c'\n")
        keys.reload()
        keys.reload()
        assert keys.find(b"a") is not None
        file.unlink()
        keys.reload()
        keys.reload()
        assert keys.find(b"a") is not None
        replace(file, entry("b", "b"))
        keys.reload()
    assert [(line["event"], line["log_level"]) for line in lines] == [
        ("keys_not_reloaded", "error"),
        ("keys_not_reloaded", "error"),
        ("keys_reloaded", "info"),
    ]
    assert "entry 2" in lines[0]["reason"]
    assert keys.find(b"a") is None
    assert len(seen) == 2


@pytest.mark.anyio
async def test_a_file_nested_too_deeply(tmp_path: Path) -> None:
    """A file on which the parser's recursion ends is logged, and the next file is read."""
    file = tmp_path / "keys.toml"
    file.write_text(entry("a", "a"))
    keys, _ = watched(file)
    task = asyncio.create_task(keys.watch())
    with capture_logs() as lines:
        replace(file, "keys = " + "[" * 3000 + "]" * 3000)
        async with asyncio.timeout(20):
            while not lines:
                await asyncio.sleep(0.05)
        assert "nested too deeply" in lines[0]["reason"]
        replace(file, entry("b", "b"))
        async with asyncio.timeout(20):
            while keys.find(b"b") is None:
                await asyncio.sleep(0.05)
    assert keys.find(b"a") is None
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def test_the_digest_of_an_empty_secret_is_refused(tmp_path: Path) -> None:
    """An entry that would admit an empty bearer token is an error that names the entry."""
    file = tmp_path / "keys.toml"
    file.write_text(entry("a", "a") + entry("b", ""))
    with pytest.raises(StartError, match=r"entry 2: sha256 is that of an empty secret"):
        watched(file)


@pytest.mark.anyio
async def test_watch_reloads_in_the_background(tmp_path: Path) -> None:
    """While ``watch`` runs, a change takes effect within seconds."""
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
