"""How a command ends that cannot do what it was asked: a sentence on stderr, and an exit code."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from taskvec_train.errors import TrainingError

FAILED = 3
"""Exit code of a command that could not be done."""

NEEDED = {
    "train": (
        "torch",
        "transformers",
        "peft",
        "accelerate",
        "pyarrow",
        "lxml",
        "tensorboard",
        "matplotlib",
    ),
    "eval": ("bm25s", "scipy", "sklearn"),
}
"""Modules of each extra."""


@contextmanager
def exit_on_error(*extras: str) -> Iterator[None]:
    """Tell failures that the user can cure in a sentence; ``extras`` are needed beside `train`."""
    extras = ("train", *extras)
    needed = [name for extra in extras for name in NEEDED[extra]]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        install = f"pip install 'taskvec[{','.join(extras)}]'"
        typer.echo(f"Training needs {', '.join(missing)}: {install}.", err=True)
        sys.exit(FAILED)
    try:
        yield
    except TrainingError as error:
        typer.echo(str(error), err=True)
        sys.exit(FAILED)
    except OSError as error:
        typer.echo(f"{error}. Nothing half-written was left; cure it and run it again.", err=True)
        sys.exit(FAILED)
    except KeyboardInterrupt:
        typer.echo("Interrupted: the same command goes on from the last state.", err=True)
        sys.exit(130)
