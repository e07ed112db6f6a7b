"""Files that are either whole or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import orjson
from safetensors import SafetensorError

from taskvec_train.errors import TrainingError


@contextmanager
def whole_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """A new folder to fill; it takes its name when all went well, and is removed otherwise.

    Args:
        folder: the name it gets.
        replace: take the place of a folder of that name.

    Raises:
        TrainingError: it exists already, or the disk refuses it.
    """
    if folder.exists() and not replace:
        raise TrainingError(f"{folder} exists already: name another folder, or remove it.")
    unfinished = folder.with_name(f".{folder.name}.part")
    with _clear_disk_errors(folder):
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        try:
            yield unfinished
            if folder.exists():
                aside = folder.with_name(f".{folder.name}.old")
                folder.rename(aside)
                unfinished.rename(folder)
                shutil.rmtree(aside)
            else:
                unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def resumable_folder(folder: Path) -> Iterator[Path]:
    """As ``whole_folder``, but what was done before a kill or Ctrl-C is found again.

    An error empties it: what is kept is only what was cut short from outside.

    Raises:
        TrainingError: the folder exists already, or the disk refuses it.
    """
    if folder.exists():
        raise TrainingError(f"{folder} exists already: name another folder, or remove it.")
    unfinished = folder.with_name(f".{folder.name}.part")
    with _clear_disk_errors(folder):
        unfinished.mkdir(parents=True, exist_ok=True)
        try:
            yield unfinished
            unfinished.rename(folder)
        except Exception:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """A name to write to; it becomes ``file`` when all went well, and is removed otherwise.

    Raises:
        TrainingError: the disk refuses it.
    """
    unfinished = file.with_name(f".{file.name}.part")
    with _clear_disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield unfinished
            unfinished.replace(file)
        finally:
            unfinished.unlink(missing_ok=True)


def write_jsonl(file: Path, records: Iterable[Mapping[str, object]]) -> None:
    """Write one JSON object a line.

    Raises:
        TrainingError: the disk refuses it.
    """
    with whole_file(file) as unfinished, unfinished.open("wb") as stream:
        stream.writelines(orjson.dumps(record) + b"\n" for record in records)


@contextmanager
def _clear_disk_errors(place: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is None:
            raise
        raise disk_error(place, error) from error


def disk_error(place: Path, error: Exception) -> TrainingError:
    """What to say where a file or folder cannot be written."""
    return TrainingError(
        f"{place} cannot be written ({getattr(error, 'strerror', None) or error}): free some space "
        "or name another folder. Nothing half-written was left; the same command goes on from what "
        "is whole."
    )


def reserve(file: Path) -> None:
    """Take the disk space of a sparse file now: a mapped one would die of a full disk later.

    Raises:
        OSError: there is not enough.
    """
    if hasattr(os, "posix_fallocate"):
        with file.open("rb+") as stream:
            os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)
