"""Exit of failed commands: one sentence on standard error, and an exit code."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from taskvec.home import set_home
from taskvec_train.errors import TrainingError

FAILED = 3
"""Exit code of a command that failed."""

MODULES = {
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
"""Modules that each extra installs."""


@contextmanager
def exit_on_error(*extras: str) -> Iterator[None]:
    """Turn errors that a user can fix into one sentence and an exit code.

    Args:
        extras: extras that are needed in addition to ``train``.
    """
    extras = ("train", *extras)
    needed = [name for extra in extras for name in MODULES[extra]]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        install = f"pip install 'taskvec[{','.join(extras)}]'"
        typer.echo(f"Training needs {', '.join(missing)}: {install}.", err=True)
        sys.exit(FAILED)
    set_home()
    try:
        yield
    except TrainingError as error:
        typer.echo(str(error), err=True)
        sys.exit(FAILED)
    except OSError as error:
        typer.echo(
            f"{error}. No incomplete file was left; fix the cause and run the command again.",
            err=True,
        )
        sys.exit(FAILED)
    except KeyboardInterrupt:
        typer.echo("Interrupted: the same command resumes from the last saved state.", err=True)
        sys.exit(130)
