"""The engine process of ``taskvec serve``: how it is launched, and what it runs.

python -P -m taskvec.server.engine_process --launcher FILE [--listen FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import uvloop

from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.checkpoint.golden import file_versions
from taskvec.checkpoint.open import open_checkpoint
from taskvec.concurrency import SWITCH_INTERVAL, keep_running
from taskvec.engines.base import do_nothing
from taskvec.engines.process.launcher import EngineLauncher
from taskvec.engines.process.server import (
    EngineServer,
    EventBuffer,
    ProcessObserver,
    as_observer,
    failure_frame,
)
from taskvec.errors import StartError
from taskvec.malloc import SERVING, tune_malloc
from taskvec.service import build_engine
from taskvec.settings import EngineKind, Settings
from taskvec.telemetry.event_loop_lag import EventLoopLag
from taskvec.telemetry.interpreter_lock import InterpreterLockMonitor
from taskvec.telemetry.logs import configure_logs

if TYPE_CHECKING:
    from taskvec.metrics.engine import EngineMetrics

METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"

ORPHAN_SECONDS = 5.0
"""Time that gateways have for the rest of their work after the main process was killed."""

ENGINE_DIED, START_FAILED, ORPHANED = 1, 3, 4
"""Exit codes of the engine process."""

SECRETS = ("api_keys", "engine_api_key", "answer_cache_url", "limits_url")
"""Settings that the engine process does not need to know."""


def engine_launcher(
    settings: Settings, checkpoint: Checkpoint, listening: socket.socket | None = None
) -> EngineLauncher:
    """Return what launches the engine process of a service; nothing is launched.

    Args:
        settings: those of the service.
        checkpoint: the open checkpoint, which the process opens again.
        listening: see ``EngineLauncher``.
    """
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("TASKVEC_")
    }
    without = dict.fromkeys(SECRETS) | {"workers": 1}
    if checkpoint.card.revision is not None:
        without["revision"] = checkpoint.card.revision
        inherited["HF_HUB_OFFLINE"] = "1"  # it is downloaded
    # -P: nothing is imported from the working directory.
    command = (sys.executable, "-P", "-m", "taskvec.server.engine_process")
    own = settings.model_copy(update=without).environment()
    return EngineLauncher(command, inherited | own, listening)


def main() -> None:
    """Run the engine process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--launcher", type=int, required=True, help="connected Unix socket")
    parser.add_argument("--listen", type=int, help="Unix socket on which gateways connect")
    options = parser.parse_args()
    # The launcher says when this process ends, also where all processes get the signal.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    _end_with_launcher(options.launcher, wait=options.listen is not None)
    settings = Settings()
    configure_logs(settings.log_level)
    tune_malloc(SERVING)
    sys.setswitchinterval(SWITCH_INTERVAL)
    code = uvloop.new_event_loop().run_until_complete(_serve(settings, options))
    logging.shutdown()
    os._exit(code)  # a forward pass that nobody waits for may still be running


async def _serve(settings: Settings, options: argparse.Namespace) -> int:
    """Serve the engine until the launcher asks for the end; return the exit code."""
    observer: ProcessObserver
    on_look: Callable[[], None]
    if METRICS_FOLDER in os.environ:
        events, metrics = None, _metrics()
        observer, on_look = metrics, metrics.update_queue_age
    else:
        events = EventBuffer()
        observer, on_look = as_observer(events), do_nothing
    launcher = socket.socket(fileno=options.launcher)
    try:
        checkpoint = open_checkpoint(settings.model, settings.revision, settings.task_name)
        files = file_versions(checkpoint)
        engine = build_engine(settings, checkpoint, observer)
    except Exception as error:  # noqa: BLE001 - the launcher must know, whatever it is
        launcher.sendall(failure_frame(error))
        return START_FAILED
    server = EngineServer(
        engine, observer, events, on_look, stall_seconds=settings.dead_timeout, files=files
    )
    loop = asyncio.get_running_loop()
    launcher.setblocking(False)
    await loop.create_unix_connection(server.connect_launcher, sock=launcher)
    if options.listen is not None:
        await server.listen(socket.socket(fileno=options.listen))
    server.start_heartbeat()
    tasks = [
        asyncio.create_task(part)
        for part in (
            engine.start(),
            server.stop_requested.wait(),
            keep_running("watch the engine", server.watch),
            server.launcher_lost.wait(),
        )
    ]
    starting, stopping, watching, losing = tasks
    await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
    if stopping.done() and not starting.done() and settings.engine is EngineKind.PACKED:
        return 0  # nobody waits until the weights are loaded
    await asyncio.wait([starting])
    failure = starting.exception()
    if failure is None and file_versions(checkpoint) != files:
        failure = StartError(f"The files of {checkpoint.folder} have changed while they were read.")
    if failure is not None:
        server.report_failure(failure)
        await server.close()
        return START_FAILED
    server.report_status()
    gc.freeze()  # what is loaded lives as long as the process: no collection need visit it
    lag = EventLoopLag(observer.process_loop_late)
    lag.start()
    with InterpreterLockMonitor(observer.process_lock_held):
        await asyncio.wait([stopping, watching, losing], return_when=asyncio.FIRST_COMPLETED)
    if losing.done():  # the launcher has ended, or the connection failed
        if options.listen is not None:
            await asyncio.sleep(ORPHAN_SECONDS)
        return ORPHANED
    if not stopping.done():
        await server.close()
        return ENGINE_DIED
    await engine.stop()
    server.flush_events()
    await server.close()
    return 0


def _metrics() -> EngineMetrics:
    """Return metrics in the folder that all processes of the service share."""
    # Both read the folder when they are imported, and take memory where they are not needed.
    from prometheus_client import CollectorRegistry  # noqa: PLC0415

    from taskvec.metrics.engine import EngineMetrics  # noqa: PLC0415

    return EngineMetrics(CollectorRegistry())


def _end_with_launcher(launcher: int, *, wait: bool) -> None:
    """End this process soon after the one that launched it, whatever ended that.

    Args:
        launcher: socket that is connected to it.
        wait: gateways are connected as well, and drain; give them ``ORPHAN_SECONDS``.
    """
    watched = os.dup(launcher)

    def watch() -> None:
        polled = select.poll()
        polled.register(watched, 0)  # a hang-up is always reported
        polled.poll()
        if wait:
            time.sleep(ORPHAN_SECONDS)
        os._exit(ORPHANED)

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()


if __name__ == "__main__":
    main()
