"""The Python API: ``from taskvec import Embedder``."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import weakref
from collections.abc import Coroutine, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import numpy as np
import structlog
from numpy.typing import NDArray

from taskvec.checkpoint.backbone import ModelCard
from taskvec.checkpoint.open import DEFAULT_MODEL, open_checkpoint
from taskvec.core.admission import NO_LIMIT, Admission
from taskvec.core.embedder import AsyncEmbedder
from taskvec.core.health import ServiceHealth
from taskvec.core.job import EmbedJob
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
        self._loop = asyncio.new_event_loop()
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
        if self.is_forked or self._loop.is_closed():
            coroutine.close()
            raise RuntimeError(
                "The Embedder was made before this process was forked: make one in each process."
                if self.is_forked
                else "The Embedder is closed."
            )
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

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


def _stop_at_exit(thread: _LoopThread, engine: PackedEngine, tokenizer: TextTokenizer) -> None:
    """Stop what an Embedder has started that nobody closed, without waiting long."""
    if not thread.is_forked:  # a child has none of the threads
        engine.stop_at_exit(EXIT_SECONDS)
        tokenizer.close()
        thread.stop()


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
        """
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
        self._embedder = AsyncEmbedder(
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
        task: str | Task | None = None,
        dimensions: int | None = None,
        *,
        normalized: bool = True,
        truncate: bool = False,
    ) -> NDArray[np.float32]:
        """Embed texts.

        Args:
            texts: one text or several; an empty text is an error.
            task: one of ``tasks``, an alias, or a ``Task`` with a prompt and an adapter; None for
                ``text-matching``, or the model's own default.
            dimensions: number of leading values to keep; None for all.
            normalized: scale each vector to length 1.
            truncate: True truncates texts that are too long, False rejects them.

        Returns:
            float32 [texts, dimensions].

        Raises:
            InvalidRequestError: unknown task, invalid dimensions, an empty or too long text.
        """
        items = [texts] if isinstance(texts, str) else list(texts)
        chosen = task if isinstance(task, Task) else self.task(task)
        for i, text in enumerate(items):
            if not isinstance(text, str) or not text:
                raise InvalidRequestError(
                    f"texts[{i}] must be a non-empty string.", code="invalid_input"
                )
        width = self.model.dimension if dimensions is None else dimensions
        output = OutputFormat(width, normalized=normalized)
        output.check(self.model.dimension)
        if not items:
            return np.empty((0, width), dtype=np.float32)
        job = EmbedJob(inputs=items, task=chosen, truncate=truncate)
        result = self._thread.call(self._embedder.embed(job))
        return cast("NDArray[np.float32]", output.apply(result.vectors)[OutputType.FLOAT])

    def close(self) -> None:
        """Finish running calls, then free the model."""
        if self._finalizer.detach() is not None and not self._thread.is_forked:
            self._thread.call(self._engine.stop())
            self._thread.call(self._embedder.close())
            self._thread.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
