"""Atomic files and folders: complete under their name, or absent."""

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
def atomic_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a new folder that is renamed at the end; it is deleted after an error.

    Args:
        folder: the final name.
        replace: True replaces an existing folder.

    Raises:
        TrainingError: the folder exists, or cannot be written.
    """
    if folder.exists() and not replace:
        raise TrainingError(f"{folder} already exists: choose another folder, or remove it.")
    unfinished = folder.with_name(f".{folder.name}.part")
    with _readable_disk_errors(folder):
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        try:
            yield unfinished
            if folder.exists():
                old = folder.with_name(f".{folder.name}.old")
                folder.rename(old)
                unfinished.rename(folder)
                shutil.rmtree(old)
            else:
                unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def resumable_folder(folder: Path) -> Iterator[Path]:
    """Do as ``atomic_folder``, but let an interrupted run find its partial content again.

    Ctrl-C or a kill keeps the content; an error deletes it.

    Raises:
        TrainingError: the folder exists, or cannot be written.
    """
    if folder.exists():
        raise TrainingError(f"{folder} already exists: choose another folder, or remove it.")
    unfinished = folder.with_name(f".{folder.name}.part")
    with _readable_disk_errors(folder):
        unfinished.mkdir(parents=True, exist_ok=True)
        try:
            yield unfinished
            unfinished.rename(folder)
        except Exception:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise


@contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """Yield a temporary file name that is renamed at the end; the file is deleted after an error.

    Raises:
        TrainingError: the file cannot be written.
    """
    unfinished = file.with_name(f".{file.name}.part")
    with _readable_disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield unfinished
            unfinished.replace(file)
        finally:
            unfinished.unlink(missing_ok=True)


def write_jsonl(file: Path, records: Iterable[Mapping[str, object]]) -> None:
    """Write one JSON object a line.

    Raises:
        TrainingError: the file cannot be written.
    """
    with atomic_file(file) as unfinished, unfinished.open("wb") as stream:
        stream.writelines(orjson.dumps(record) + b"\n" for record in records)


@contextmanager
def _readable_disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is None:
            raise
        raise disk_error(path, error) from error


def disk_error(path: Path, error: Exception) -> TrainingError:
    """Return the error for a file or folder that cannot be written."""
    return TrainingError(
        f"{path} cannot be written ({getattr(error, 'strerror', None) or error}): free some space "
        "or choose another folder. No incomplete file was left; the same command resumes."
    )


def reserve_space(file: Path) -> None:
    """Allocate the disk space of a sparse file.

    Otherwise a full disk would kill the process (SIGBUS) when it writes to the mapped file.

    Raises:
        OSError: the disk is full.
    """
    if hasattr(os, "posix_fallocate"):
        with file.open("rb+") as stream:
            os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)
