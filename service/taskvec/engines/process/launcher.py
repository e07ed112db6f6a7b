"""Launches the engine process, and launches it again when it has ended."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence

import structlog

from taskvec.errors import StartError
from taskvec.open_files import FILE_RETRY_SECONDS

MAX_FAILED_STARTS = 5
"""Processes in a row that ended before their engine was ready, after which no other is launched."""

STABLE_SECONDS = 60.0
"""A process that lived this long is replaced at once when it ends."""

FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.5, 5.0
"""Pause before a process that replaces one that lived less long; it doubles each time."""

EXIT_SECONDS = 5.0
"""Time in which a process ends that has closed its connection."""

STOP_SECONDS = 15.0
"""Time in which a process ends that was asked to."""

POLL_INTERVAL = 0.01
"""Seconds between two checks of whether a process has ended; a thread that waits may be one more
than the system has."""

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
            command: command line; ``--launcher FILE`` is appended, and ``--listen FILE`` if
                gateways connect.
            environment: of the process.
            listening: Unix socket on which gateways connect; None if the launcher is the only one.
        """
        self._command = list(command)
        self._environment = dict(environment)
        self._listening = listening
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._launched_at = 0.0
        self._was_ready = False
        self._failed_starts = 0
        self._pause = 0.0
        self._reason = ""
        self._end_reason = ""
        self._closed = False
        self._on_restart: Callable[[], None] = lambda: None

    @property
    def pid(self) -> int | None:
        """Id of the process that runs; None between two."""
        return None if self._process is None else self._process.pid

    def on_restart(self, call: Callable[[], None]) -> None:
        """Call a function whenever a process was launched that replaces another."""
        self._on_restart = call

    def launch(self) -> None:
        """Start a process.

        Raises:
            StartError: the system has no process, file or memory for it.
        """
        try:
            self._launch()
        except (OSError, MemoryError) as error:
            raise StartError(
                f"The engine's process cannot be launched ({_why(error)}): raise the limits of "
                "open files, processes and memory."
            ) from None

    def _launch(self) -> None:
        own, theirs = socket.socketpair()
        with theirs:
            files = [theirs.fileno()]
            options = ["--launcher", str(theirs.fileno())]
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
        self._launched_at = time.monotonic()

    async def open(self) -> socket.socket:
        """See ``EngineSource.open``."""
        while self._socket is None:
            if self._process is not None:  # an error came between its connection and its end
                await self.ended(ready=False)
            if self._failed_starts >= MAX_FAILED_STARTS:
                raise StartError(
                    f"The engine's process has ended {self._failed_starts} times before it was "
                    f"ready, at last because it was {self._reason}: see its log, and the free "
                    "memory."
                )
            await asyncio.sleep(self._pause)
            if self._closed:
                await asyncio.Future()  # the service stops, and cancels this
            try:
                self._launch()  # in no thread: it takes some milliseconds
            except (OSError, MemoryError) as error:
                log.error("engine_not_launched", reason=str(error))  # noqa: TRY400 - says it all
                self._failed_starts += 1
                self._reason = f"not launched ({_why(error)})"
                await asyncio.sleep(FILE_RETRY_SECONDS)
            else:
                self._on_restart()
        opened, self._socket = self._socket, None
        return opened

    async def ended(self, *, ready: bool) -> str:
        """See ``EngineSource.ended``."""
        how = await self._wait(EXIT_SECONDS)
        self._reason, self._end_reason = self._end_reason or how, ""
        lived = time.monotonic() - self._launched_at
        self._failed_starts = 0 if ready else self._failed_starts + 1
        self._was_ready |= ready
        if ready and lived >= STABLE_SECONDS:
            self._pause = 0.0
        else:
            self._pause = min(MAX_PAUSE_SECONDS, max(FIRST_PAUSE_SECONDS, 2 * self._pause))
        if self._was_ready and not self._closed:  # the reason why a first one failed is raised
            log.error(
                "engine_process_ended",
                reason=self._reason,
                ready=ready,
                restart_seconds=self._pause if self._failed_starts < MAX_FAILED_STARTS else None,
            )
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
        await self._wait(STOP_SECONDS)

    def kill(self) -> None:
        """End the process at once, if it has not ended."""
        self._closed = True
        process = self._process
        if process is not None:
            process.kill()
            process.wait()
            self._forget(process)

    async def _wait(self, seconds: float) -> str:
        """Wait for the end of the process, kill it if that takes too long; say how it ended."""
        process = self._process
        if process is None:
            return self._reason
        limit = time.monotonic() + seconds
        while process.poll() is None:
            if time.monotonic() >= limit:
                process.kill()
            await asyncio.sleep(POLL_INTERVAL)
        self._forget(process)
        return describe_end(process.returncode)

    def _forget(self, process: subprocess.Popen[bytes]) -> None:
        """Forget a process that has ended, and a connection to it that nobody has opened."""
        if self._process is process:
            self._process = None
            if self._socket is not None:
                self._socket.close()
                self._socket = None


def _why(error: OSError | MemoryError) -> str:
    """Say why nothing was launched."""
    return (error.strerror if isinstance(error, OSError) else None) or "no memory"


def describe_end(code: int) -> str:
    """Say how a process ended, in words that follow "it was"."""
    if code >= 0:
        return f"ended with code {code}"
    name = signal.Signals(-code).name
    hint = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
    return f"killed by {name}{hint}"
