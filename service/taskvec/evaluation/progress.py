"""How far an evaluation is, for who waits at a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from taskvec.evaluation.run import Watch


@contextmanager
def progress() -> Iterator[Watch]:
    """One bar on standard error, where that is a terminal."""
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )
    with bars:
        bar = bars.add_task("", total=None)

        def watch(what: str, steps: int) -> Callable[[int], None]:
            bars.reset(bar, description=what, total=steps)
            return lambda done: bars.advance(bar, done)

        yield watch
