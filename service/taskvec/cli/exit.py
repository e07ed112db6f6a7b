"""Exit codes and error messages of the commands."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import typer
from pydantic import ValidationError

from taskvec.errors import StartError, TaskvecError
from taskvec.home import set_home
from taskvec.permissions import read_failure
from taskvec.settings import environment_variable

EXIT_USAGE, EXIT_START_FAILED = 2, 3
"""Exit codes: invalid arguments or input, and a failed start (as uvicorn's)."""

SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM)
"""Errors of a system that has no file, process, thread or memory left."""

_EXTRA_OF_MODULE = {
    "torch": "packed",
    "bm25s": "eval",
    "matplotlib": "eval",
    "scipy": "eval",
    "sklearn": "eval",
    "mteb": "mteb",
}


@contextmanager
def name_missing_extra() -> Iterator[None]:
    """Turn the import error of an optional library into a StartError that names the extra.

    Raises:
        StartError: a library of an extra is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as missing:
        name = (missing.name or "").partition(".")[0]
        if name not in _EXTRA_OF_MODULE:
            raise
        extra = _EXTRA_OF_MODULE[name]
        raise StartError(f"This command needs {name}: install taskvec[{extra}].") from None


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Exit with one sentence instead of a traceback, for errors that a user can fix."""
    try:
        set_home()
        yield
    except StartError as error:
        exit_with(str(error), EXIT_START_FAILED)
    except PermissionError as error:
        if error.filename is None:
            raise
        path = Path(os.fsdecode(error.filename))
        exit_with(f"{path} cannot be used: {read_failure(path, error)}.", EXIT_START_FAILED)
    except OSError as error:
        if error.errno not in SHORTAGES:
            raise
        exit_with(
            f"The system has nothing left for this process ({error.strerror}): raise the limits of "
            "open files, processes and memory.",
            EXIT_START_FAILED,
        )
    except TaskvecError as error:
        exit_with(error.message, EXIT_USAGE)
    except ValidationError as error:
        exit_with("; ".join(map(_setting_error, error.errors())), EXIT_USAGE)


def _setting_error(error: Any) -> str:
    """Return the message of an invalid setting, with its option and variable."""
    message = str(error["msg"]).removeprefix("Value error, ")
    if not error["loc"]:
        return message
    name = str(error["loc"][0])
    return f"--{name.replace('_', '-')} ({environment_variable(name)}): {message}"


def exit_with(sentence: str, code: int) -> NoReturn:
    """Print a sentence on standard error and exit with a code."""
    logging.shutdown()  # flushes buffered log lines, so that they come before the sentence
    typer.echo(f"taskvec: {sentence}", err=True)
    raise typer.Exit(code)
