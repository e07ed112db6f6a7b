"""Launches the engine process, and launches it again when it has ended."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence

import structlog

from taskvec.errors import StartError
from taskvec.open_files import FILE_RETRY_SECONDS

MAX_FAILED_STARTS = 5
"""Processes in a row that ended before their engine was ready, after which no other is launched."""

STABLE_SECONDS = 60.0
"""A process that lived this long is replaced at once when it ends."""

FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.5, 5.0
"""Pause before a process that replaces one which did not; it doubles each time."""

EXIT_SECONDS = 5.0
"""Time in which a process ends that has closed its connection."""

STOP_SECONDS = 15.0
"""Time in which a process ends that was asked to."""

log = structlog.get_logger(__name__)


class EngineLauncher:
    """Owns the engine process: the one that runs, and those that replace it."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        listening: socket.socket | None = None,
    ) -> None:
        """Prepare; ``launch`` starts the first process.

        Args:
            command: command line; ``--launcher FILE`` and ``--restarts N`` are appended, and
                ``--listen FILE`` if gateways connect.
            environment: of the process.
            listening: Unix socket on which gateways connect; None if the launcher is the only one.
        """
        self._command = list(command)
        self._environment = dict(environment)
        self._listening = listening
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._launched_at = 0.0
        self._launches = 0
        self._failed_starts = 0
        self._pause = 0.0
        self._reason = ""
        self._end_reason = ""
        self._closed = False

    @property
    def pid(self) -> int | None:
        """Id of the process that runs; None between two."""
        return None if self._process is None else self._process.pid

    def launch(self) -> None:
        """Start a process.

        Raises:
            OSError: the system has no process, file or memory for it.
        """
        own, theirs = socket.socketpair()
        with theirs:
            files = [theirs.fileno()]
            options = ["--launcher", str(theirs.fileno()), "--restarts", str(self._launches)]
            if self._listening is not None:
                files.append(self._listening.fileno())
                options += ["--listen", str(self._listening.fileno())]
            try:
                self._process = subprocess.Popen(  # noqa: S603 - the command is ours
                    [*self._command, *options],
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    pass_fds=files,
                    start_new_session=True,  # Ctrl-C is for the gateway, which drains first
                )
            except BaseException:
                own.close()
                raise
        own.setblocking(False)
        self._socket = own
        self._launches += 1
        self._launched_at = time.monotonic()

    async def open(self) -> socket.socket:
        """See ``EngineSource.open``."""
        while self._process is None:
            if self._failed_starts >= MAX_FAILED_STARTS:
                raise StartError(
                    f"The engine's process has ended {self._failed_starts} times before it was "
                    f"ready, at last because it was {self._reason}: see its log, and the free "
                    "memory."
                )
            await asyncio.sleep(self._pause)
            try:
                await asyncio.to_thread(self.launch)
            except OSError as error:
                log.error("engine_not_launched", reason=str(error))  # noqa: TRY400 - says it all
                self._failed_starts += 1
                self._reason = f"not launched ({error.strerror})"
                await asyncio.sleep(FILE_RETRY_SECONDS)
        assert self._socket is not None  # noqa: S101 - launch() made it
        opened, self._socket = self._socket, None
        return opened

    async def ended(self, *, ready: bool) -> str:
        """See ``EngineSource.ended``."""
        how = await asyncio.to_thread(self._wait, EXIT_SECONDS)
        self._reason, self._end_reason = self._end_reason or how, ""
        lived = time.monotonic() - self._launched_at
        self._failed_starts = 0 if ready else self._failed_starts + 1
        if ready and lived >= STABLE_SECONDS:
            self._pause = 0.0
        else:
            self._pause = min(MAX_PAUSE_SECONDS, max(FIRST_PAUSE_SECONDS, 2 * self._pause))
        if ready and not self._closed:
            log.error("engine_process_ended", reason=self._reason, restart_seconds=self._pause)
        return self._reason

    def end_silent(self, seconds: float) -> None:
        """See ``EngineSource.end_silent``."""
        if self._process is not None:
            log.error("engine_process_hangs", process=self._process.pid, silent_seconds=seconds)
            self._end_reason = f"killed after it had not responded for {seconds:.0f} seconds"
            self._process.kill()  # its connection then ends

    async def close(self) -> None:
        """See ``EngineSource.close``."""
        self._closed = True
        await asyncio.to_thread(self._wait, STOP_SECONDS)

    def kill(self) -> None:
        """End the process at once, if it has not ended."""
        self._closed = True
        self._wait(0.0)

    def _wait(self, seconds: float) -> str:
        """Wait for the end of the process, kill it if that takes too long; say how it ended."""
        process, self._process = self._process, None
        if process is None:
            return self._reason
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        if self._socket is not None:  # nobody has opened it
            self._socket.close()
            self._socket = None
        return _how(code)


def _how(code: int) -> str:
    """Say how a process ended, in words that follow "it was"."""
    if code >= 0:
        return f"ended with code {code}"
    name = signal.Signals(-code).name
    hint = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
    return f"killed by {name}{hint}"
