"""``taskvec embed``: embed lines in chunks, so that memory does not depend on the input's size."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Protocol, Self

import numpy as np
import orjson
from numpy.lib import format as npy
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from taskvec.errors import InvalidRequestError
from taskvec.library import Embedder

CHUNK_LINES = 1024
"""Lines per call of the embedder: enough for full batches, few enough to keep in memory."""


def embed_lines(
    embedder: Embedder,
    lines: BinaryIO,
    output: Path | BinaryIO,
    *,
    task: str | None,
    dimensions: int | None,
    truncate: bool,
) -> None:
    """Embed every line and write the vectors.

    Args:
        embedder: loaded model.
        lines: UTF-8, one text per line.
        output: a path for one .npy file, float32 [lines, dimensions]; or a stream for JSON lines
            ``{"index": 0, "embedding": [...]}``.
        task: see ``Embedder.embed``.
        dimensions: see ``Embedder.embed``.
        truncate: see ``Embedder.embed``.

    Raises:
        InvalidRequestError: a line is empty, too long or not UTF-8; the message has its number.
    """
    console = Console(stderr=True)
    progress = Progress(
        SpinnerColumn(),
        TextColumn("embedding"),
        MofNCompleteColumn(),
        TextColumn("lines, {task.fields[rate]}/s"),
        TimeElapsedColumn(),
        console=console,
        disable=not sys.stderr.isatty(),
    )
    with progress, _open_writer(output) as writer:
        bar = progress.add_task("", total=None, rate="?")
        done = 0
        for chunk in _chunks(_texts(lines)):
            try:
                vectors = embedder.embed(chunk, task, dimensions, truncate=truncate)
            except InvalidRequestError as error:
                if error.param is None or not error.param.startswith("input["):
                    raise
                index = int(error.param[6:].partition("]")[0])
                message = error.message.removeprefix(f"{error.param} ")
                message = message.replace("send truncate: true", "use --truncate")
                raise InvalidRequestError(f"Line {done + index + 1} {message}") from None
            writer.write(vectors)
            done += len(chunk)
            elapsed = progress.tasks[0].elapsed or 0.0
            progress.update(bar, completed=done, rate=f"{done / max(elapsed, 1e-3):.0f}")


def _texts(lines: Iterable[bytes]) -> Iterator[str]:
    for number, raw in enumerate(lines, 1):
        try:
            text = raw.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            raise InvalidRequestError(f"Line {number} is not UTF-8.") from None
        if not text:
            raise InvalidRequestError(f"Line {number} is empty.")
        yield text


def _chunks(texts: Iterator[str]) -> Iterator[list[str]]:
    while chunk := list(islice(texts, CHUNK_LINES)):
        yield chunk


class _Writer(Protocol):
    def write(self, vectors: NDArray[np.float32]) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


def _open_writer(output: Path | BinaryIO) -> _Writer:
    return _NpyWriter(output) if isinstance(output, Path) else _JsonLinesWriter(output)


class _JsonLinesWriter:
    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._written = 0

    def write(self, vectors: NDArray[np.float32]) -> None:
        for vector in vectors:
            line = {"index": self._written, "embedding": vector}
            self._stream.write(
                orjson.dumps(line, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)
            )
            self._written += 1
        self._stream.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


class _NpyWriter:
    """Appends rows to a .npy file, and at the end rewrites its header with the final shape.

    numpy pads the header so that the number of rows can grow in place (numpy.lib.format).
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._shape: Sequence[int] = (0, 0)

    def write(self, vectors: NDArray[np.float32]) -> None:
        if not self._shape[0]:
            self._shape = (0, vectors.shape[1])
            self._write_header()
        self._file.write(np.ascontiguousarray(vectors).tobytes())
        self._shape = (self._shape[0] + len(vectors), vectors.shape[1])

    def _write_header(self) -> None:
        self._file.seek(0)
        npy.write_array_header_1_0(
            self._file, {"descr": "<f4", "fortran_order": False, "shape": tuple(self._shape)}
        )

    def __enter__(self) -> Self:
        try:
            self._file = self._path.open("wb")
        except OSError as error:
            raise InvalidRequestError(
                f"{self._path} cannot be written: {error.strerror}."
            ) from None
        return self

    def __exit__(self, *exception: object) -> None:
        self._write_header()
        self._file.close()
