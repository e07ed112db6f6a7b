"""How a command ends that cannot do what it was asked: one sentence, and an exit code."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from pydantic import ValidationError

from taskvec.errors import StartError, TaskvecError
from taskvec.settings import environment_variable

USAGE, BAD_START = 2, 3
"""Exit codes: wrong arguments, and a start that failed."""

_EXTRAS = {
    "torch": "packed",
    "bm25s": "eval",
    "matplotlib": "eval",
    "scipy": "eval",
    "sklearn": "eval",
    "mteb": "mteb",
}


@contextmanager
def name_missing_extra() -> Iterator[None]:
    """A library of an extra that is not installed is a failed start that names the extra."""
    try:
        yield
    except ModuleNotFoundError as missing:
        name = (missing.name or "").partition(".")[0]
        if name not in _EXTRAS:
            raise
        raise StartError(f"This needs {name}: install taskvec[{_EXTRAS[name]}].") from None


@contextmanager
def exit_on_error() -> Iterator[None]:
    """One sentence on standard error instead of a traceback, for failures a user can cure."""
    try:
        yield
    except StartError as error:
        exit_with(str(error), BAD_START)
    except TaskvecError as error:
        exit_with(error.message, USAGE)
    except ValidationError as error:
        exit_with("; ".join(map(_setting_fault, error.errors())), USAGE)


def _setting_fault(error: Any) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    if not error["loc"]:
        return message
    name = str(error["loc"][0])
    return f"--{name.replace('_', '-')} ({environment_variable(name)}): {message}"


def exit_with(sentence: str, code: int) -> NoReturn:
    """End with a sentence on standard error."""
    logging.shutdown()  # lines that still wait come before the sentence
    typer.echo(f"taskvec: {sentence}", err=True)
    raise typer.Exit(code)
