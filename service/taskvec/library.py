"""The Python API: ``from taskvec import Embedder``, or ``AsyncEmbedder``."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import weakref
from collections.abc import Callable, Coroutine, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from numbers import Integral
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import numpy as np
import structlog
from numpy.typing import NDArray

from taskvec.checkpoint.backbone import ModelCard
from taskvec.checkpoint.open import DEFAULT_MODEL, open_checkpoint
from taskvec.core.admission import NO_LIMIT, Admission
from taskvec.core.embedder import AsyncEmbedder as JobEmbedder
from taskvec.core.health import ServiceHealth
from taskvec.core.job import Embeddings, EmbedJob
from taskvec.core.output_format import OutputFormat, OutputType
from taskvec.core.tasks import Task
from taskvec.core.tokenizer import TextTokenizer
from taskvec.engines.packed.engine import PackedEngine, PackedOptions
from taskvec.errors import InvalidRequestError
from taskvec.service import build_tokenizer, task_table

T = TypeVar("T")

EXIT_SECONDS = 10.0
"""Longest wait for a running forward pass when the interpreter ends; what it makes is not used."""


class _LoopThread:
    """An event loop in a daemon thread, which does not keep the interpreter from ending."""

    def __init__(self) -> None:
        self._process = os.getpid()
        maker = threading.current_thread()
        # Not the thread itself: it has the Embedder, which would then never be collected.
        self.maker_idle = maker.idle if isinstance(maker, _Loader) else None
        self._loop = asyncio.new_event_loop()
        self._lock = threading.Lock()
        self._closing = False
        self._running: set[Future[Any]] = set()
        self._thread = threading.Thread(target=self._run, name="embedder", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the loop and return its result.

        Raises:
            RuntimeError: the process was forked after the loop was started, or it is closed.
        """
        future = self.submit(coroutine)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine in the loop; cancelling the future cancels it.

        Raises:
            RuntimeError: see ``call``.
        """
        if self.is_forked:
            coroutine.close()
            raise RuntimeError(
                "The Embedder was made before this process was forked: make one in each process."
            )
        with self._lock:
            if not self._closing and not self._loop.is_closed():
                future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
                self._running.add(future)
                future.add_done_callback(self._running.discard)
                return future
        coroutine.close()
        raise RuntimeError("The Embedder is closed.")

    def close(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Refuse further coroutines, wait for those that run, run a last one, and end the thread.

        Args:
            last: makes it.
        """
        with self._lock:
            self._closing = True
            running = list(self._running)
        wait(running)
        asyncio.run_coroutine_threadsafe(last(), self._loop).result()
        self.stop()

    @property
    def is_forked(self) -> bool:
        """Whether this process is a child of the one with the thread."""
        return os.getpid() != self._process

    def stop(self) -> None:
        """End the thread."""
        if self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        if threading.current_thread() is not self._thread:  # the collector may run in it
            self._thread.join(EXIT_SECONDS)


class _Loader(threading.Thread):
    """Runs a function in a daemon thread, for a caller that must not block.

    Attributes:
        future: result of the function.
        idle: set when the thread runs no code that the end of the interpreter must not interrupt.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__(name="embedder-loader", daemon=True)
        self._function = function
        self.future: Future[Any] = Future()
        self.idle = threading.Event()
        threading._register_atexit(_wait_until, self.idle, os.getpid())  # type: ignore[attr-defined] # noqa: SLF001
        self.future.set_running_or_notify_cancel()  # a caller that is cancelled ends it for nobody
        self.start()

    def run(self) -> None:
        try:
            self.future.set_result(self._function())
        except BaseException as error:  # noqa: BLE001 - whoever waits gets it
            self.future.set_exception(error)
        finally:
            self.idle.set()


def _wait_until(idle: threading.Event, process: int) -> None:
    if os.getpid() == process:  # a child has none of the threads
        idle.wait(EXIT_SECONDS)


async def _result(future: Future[T]) -> T:
    """Await a future of another thread; cancelling the call cancels it.

    ``asyncio.wrap_future`` would log an error if this event loop is closed before the future ends.
    """
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()

    def wake(_: Future[T]) -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(ended.set)

    future.add_done_callback(wake)
    try:
        await ended.wait()
    except BaseException:
        future.cancel()
        raise
    return future.result()


def _stop_at_exit(thread: _LoopThread, engine: PackedEngine, tokenizer: TextTokenizer) -> None:
    """Stop what an Embedder has started that nobody closed, without waiting long."""
    if not thread.is_forked:  # a child has none of the threads
        engine.stop_at_exit(EXIT_SECONDS)
        tokenizer.close()
        thread.stop()
        if thread.maker_idle is not None:  # it waits for the thread, and computes nothing
            thread.maker_idle.set()


AnyTask = str | Task | None
"""What names a task."""

DTYPES = ("auto", "bfloat16", "float16", "float32")
ADAPTER_MODES = ("auto", "merged", "low-rank")


class Embedder:
    """Embeds texts in this process; returns the same vectors as the server.

    Example:
        >>> with Embedder() as embedder:
        ...     vectors = embedder.embed(["a text"], task="clustering", dimensions=128)
        >>> vectors.shape
        (1, 128)

    Thread-safe: texts of concurrent calls share batches.
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        revision: str | None = None,
        task_name: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        adapter_mode: str = "auto",
        threads: int = 0,
    ) -> None:
        """Load a model and run the self-test of its adapters.

        Args:
            model: checkpoint folder, hub id, or the built-in ``taskvec-mini``.
            revision: hub branch, tag or commit; None for the default branch.
            task_name: task of a model without adapters, such as ``clustering``; None to derive it
                from the model's name and prompts.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            dtype: ``auto``, ``bfloat16``, ``float16`` or ``float32``.
            adapter_mode: ``auto``, ``merged`` or ``low-rank``.
            threads: CPU threads; 0 for one per core.

        Raises:
            CheckpointError: the model cannot be served; the message names the remedy.
            ValueError: an argument is none of its choices.
        """
        _require_choice("dtype", dtype, DTYPES)
        _require_choice("adapter_mode", adapter_mode, ADAPTER_MODES)
        if not isinstance(threads, int) or threads < 0:
            raise ValueError(f"threads must be a whole number of at least 0, got {threads!r}.")
        if not structlog.is_configured():  # structlog's default prints every event to stdout
            structlog.configure(
                wrapper_class=structlog.make_filtering_bound_logger("warning"),
                logger_factory=structlog.PrintLoggerFactory(sys.stderr),
            )
        checkpoint = open_checkpoint(model, revision, task_name)
        options = PackedOptions(
            device=device, dtype=dtype, adapter_mode=adapter_mode, threads=threads
        )
        engine = PackedEngine(checkpoint, options)
        tokenizer = build_tokenizer(checkpoint, max_tokens=0, threads=1, max_waiting=NO_LIMIT)
        self._embedder = JobEmbedder(
            engine,
            tokenizer,
            task_table(checkpoint),
            Admission(max_tokens=NO_LIMIT),
            ServiceHealth(engine),
        )
        self._thread = _LoopThread()
        self._engine = engine
        # Called when the object is collected, and when the interpreter ends.
        self._finalizer = weakref.finalize(self, _stop_at_exit, self._thread, engine, tokenizer)
        # Thread pools end before the callbacks of atexit; threading has no public hook before that.
        threading._register_atexit(self._finalizer)  # type: ignore[attr-defined] # noqa: SLF001
        self._thread.call(engine.start())

    @property
    def model(self) -> ModelCard:
        """The loaded model's card."""
        return self._embedder.model

    @property
    def tasks(self) -> list[str]:
        """Valid names for ``task=``."""
        return self._embedder.tasks.names

    def task(self, name: str | None = None) -> Task:
        """Return the adapter and the prompt of a task; None for the default task.

        Raises:
            InvalidRequestError: the task is unknown.
        """
        return self._embedder.tasks.choose({"task": name})

    def embed(
        self,
        texts: str | Sequence[str],
        task: AnyTask | Sequence[AnyTask] = None,
        dimensions: int | None = None,
        *,
        normalized: bool = True,
        truncate: bool = False,
    ) -> NDArray[np.float32]:
        """Embed texts.

        Args:
            texts: one text or several; an empty text is an error.
            task: one of ``tasks``, an alias, or a ``Task`` with a prompt and an adapter; None for
                ``text-matching``, or the model's own default. A sequence has the task of each text;
                texts of all tasks are embedded together.
            dimensions: number of leading values to keep; None for all.
            normalized: scale each vector to length 1.
            truncate: True truncates texts that are too long, False rejects them.

        Returns:
            float32 [texts, dimensions].

        Raises:
            InvalidRequestError: unknown task, invalid dimensions, an empty or too long text.
        """
        job, output = self._job(texts, task, dimensions, normalized, truncate)
        if job is None:
            return np.empty((0, output.dimensions), dtype=np.float32)
        result = self._thread.call(self._embedder.embed(job))
        return _rows(result, output)

    def _job(
        self,
        texts: str | Sequence[str],
        task: AnyTask | Sequence[AnyTask],
        dimensions: int | None,
        normalized: bool,
        truncate: bool,
    ) -> tuple[EmbedJob | None, OutputFormat]:
        """Return what ``embed`` asks for; None if there are no texts."""
        if isinstance(texts, Mapping | AbstractSet):
            raise InvalidRequestError(
                f"texts must be a text or a list of texts, got {type(texts).__name__}.",
                code="invalid_input",
                param="texts",
            )
        for name, flag in (("normalized", normalized), ("truncate", truncate)):
            if not isinstance(flag, bool):
                raise InvalidRequestError(
                    f"{name} must be True or False, got {flag!r}.",
                    code=f"invalid_{name}",
                    param=name,
                )
        if isinstance(dimensions, bool) or not isinstance(dimensions, Integral | None):
            raise InvalidRequestError(
                f"dimensions must be a whole number, got {dimensions!r}.",
                code="invalid_dimensions",
                param="dimensions",
            )
        items = [texts] if isinstance(texts, str) else list(texts)
        several = not (task is None or isinstance(task, str | Task))
        tasks = self._tasks(task, len(items)) if several else [self._task(task, "task")]
        for i, text in enumerate(items):
            if not isinstance(text, str) or not text:
                raise InvalidRequestError(
                    f"texts[{i}] must be a non-empty string.", code="invalid_input"
                )
        width = self.model.dimension if dimensions is None else dimensions
        output = OutputFormat(width, normalized=normalized)
        output.check(self.model.dimension)
        if not items:
            return None, output
        job = EmbedJob(
            inputs=items,
            task=tasks[0],
            tasks=tasks if len(set(tasks)) > 1 else None,
            truncate=truncate,
        )
        return job, output

    def _tasks(self, task: Any, texts: int) -> list[Task]:
        """Return the task of each text."""
        tasks = [self._task(one, f"task[{i}]") for i, one in enumerate(task)]
        if len(tasks) != texts:
            raise InvalidRequestError(
                f"task has {len(tasks)} entries and texts {texts}: send one task, or one for each "
                "text.",
                code="invalid_input",
                param="task",
            )
        return tasks

    def _task(self, task: Any, where: str) -> Task:
        if isinstance(task, Task):
            return task
        if task is not None and not isinstance(task, str):
            raise InvalidRequestError(
                f"{where} must be a task's name or a Task, got {type(task).__name__}.",
                code="unknown_task",
                param=where,
            )
        return self._embedder.tasks.choose({where: task})

    def _submit(self, job: EmbedJob, output: OutputFormat) -> Future[NDArray[np.float32]]:
        """Start to embed; the rows are made in the thread as well."""

        async def rows() -> NDArray[np.float32]:
            return _rows(await self._embedder.embed(job), output)

        return self._thread.submit(rows())

    def close(self) -> None:
        """Refuse further calls, finish those that run, then free the model."""
        if self._finalizer.detach() is not None and not self._thread.is_forked:
            self._thread.close(self._free)

    async def _free(self) -> None:
        await self._engine.stop()
        await self._embedder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _require_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")


def _rows(result: Embeddings, output: OutputFormat) -> NDArray[np.float32]:
    return cast("NDArray[np.float32]", output.apply(result.vectors)[OutputType.FLOAT])


class AsyncEmbedder:
    """The asynchronous version of ``Embedder``: the same calls, awaited, and the same vectors.

    Example:
        >>> async def main():
        ...     async with AsyncEmbedder() as embedder:
        ...         return await embedder.embed(["a text"], task="clustering", dimensions=128)
        >>> asyncio.run(main()).shape
        (1, 128)

    The event loop is not blocked while the model loads or embeds: both happen in other threads.
    Texts of concurrent calls share batches. Cancelling a call drops those of its texts that wait.
    It may be used in several event loops and threads.
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        revision: str | None = None,
        task_name: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        adapter_mode: str = "auto",
        threads: int = 0,
    ) -> None:
        """Remember what to load: ``async with``, ``load`` or the first call loads it.

        Args:
            model: see ``Embedder``, as the others.
            revision: see there.
            task_name: see there.
            device: see there.
            dtype: see there.
            adapter_mode: see there.
            threads: see there.
        """
        self._make = partial(
            Embedder,
            model,
            revision=revision,
            task_name=task_name,
            device=device,
            dtype=dtype,
            adapter_mode=adapter_mode,
            threads=threads,
        )
        self._lock = threading.Lock()
        self._loading: Future[Embedder] | None = None
        self._process = os.getpid()
        self._closed = False

    async def load(self) -> Self:
        """Load the model, if that has not been done; calls that come meanwhile wait for it.

        Raises:
            CheckpointError: the model cannot be served; the message names the remedy.
            RuntimeError: it is closed, or the process was forked after it began to load.
        """
        await self._loaded()
        return self

    @property
    def model(self) -> ModelCard:
        """The loaded model's card."""
        return self._ready.model

    @property
    def tasks(self) -> list[str]:
        """Valid names for ``task=``."""
        return self._ready.tasks

    def task(self, name: str | None = None) -> Task:
        """Return the adapter and the prompt of a task; see ``Embedder.task``."""
        return self._ready.task(name)

    async def embed(
        self,
        texts: str | Sequence[str],
        task: AnyTask | Sequence[AnyTask] = None,
        dimensions: int | None = None,
        *,
        normalized: bool = True,
        truncate: bool = False,
    ) -> NDArray[np.float32]:
        """Embed texts; see ``Embedder.embed``."""
        items = [texts] if isinstance(texts, str) else list(texts)
        embedder = await self._loaded()
        job, output = embedder._job(items, task, dimensions, normalized, truncate)  # noqa: SLF001
        if job is None:
            return np.empty((0, output.dimensions), dtype=np.float32)
        return await _result(embedder._submit(job, output))  # noqa: SLF001

    async def close(self) -> None:
        """Refuse further calls, finish those that run, then free the model."""
        with self._lock:
            self._closed = True
            loading = self._loading
        if loading is None or os.getpid() != self._process:
            return
        with suppress(Exception):  # whoever loaded it has the error
            embedder = await _result(loading)
            await _result(_Loader(embedder.close).future)

    async def _loaded(self) -> Embedder:
        with self._lock:
            if self._closed:
                raise RuntimeError("The AsyncEmbedder is closed.")
            if self._loading is None or _has_failed(self._loading):
                self._process = os.getpid()
                self._loading = _Loader(self._make).future
            loading = self._loading
        if os.getpid() != self._process:
            raise RuntimeError(
                "The AsyncEmbedder was loaded before this process was forked: make one in each "
                "process."
            )
        return await _result(loading)

    @property
    def _ready(self) -> Embedder:
        loading = self._loading
        if loading is None or not loading.done():
            raise RuntimeError("The model is not loaded: use async with, or await load().")
        return loading.result()

    async def __aenter__(self) -> Self:
        return await self.load()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


def _has_failed(loading: Future[Embedder]) -> bool:
    return loading.done() and loading.exception() is not None
