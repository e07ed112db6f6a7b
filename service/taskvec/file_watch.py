"""Reads files again when they change, or when the process is asked to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

RELOAD_INTERVAL = 2.0
"""Seconds between two checks of the files."""


class FileWatch:
    """Calls a function when one of several files has changed.

    The files are polled: notifications of the kernel do not follow the links that Kubernetes swaps.
    """

    def __init__(self, files: Sequence[Path], read_again: Callable[[], None]) -> None:
        """Note the state of the files, which are read after that.

        Args:
            files: files to watch; a missing one may appear later.
            read_again: called in a thread after each change, also of a file that is then missing.
        """
        self._files = files
        self._read_again = read_again
        self._versions = self._read_versions()
        self._asked = asyncio.Event()

    def ask(self) -> None:
        """Let ``watch`` read the files at once, changed or not; call it in the event loop."""
        self._asked.set()

    def check(self, *, always: bool = False) -> None:
        """Call the function if a file has changed since the last check, or in any case."""
        versions = self._read_versions()
        if always or versions != self._versions:
            self._versions = versions
            self._read_again()

    async def watch(self) -> None:
        """Check the files every ``RELOAD_INTERVAL`` seconds until cancelled."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(RELOAD_INTERVAL):
                    await self._asked.wait()
            asked = self._asked.is_set()
            self._asked.clear()
            await asyncio.to_thread(self.check, always=asked)

    def _read_versions(self) -> list[tuple[int, ...] | None]:
        return [_version(file) for file in self._files]


def _version(file: Path) -> tuple[int, ...] | None:
    """Return device, inode, size and modification time of a file; None if it is missing.

    ``stat`` follows links, so the value also changes when Kubernetes swaps the link to a mounted
    Secret.
    """
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
