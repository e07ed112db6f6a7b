"""The Python API: ``from taskvec import Embedder``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self, cast

import numpy as np
import structlog
from anyio.from_thread import start_blocking_portal
from numpy.typing import NDArray

from taskvec.checkpoint.backbone import ModelCard
from taskvec.checkpoint.open import DEFAULT_MODEL, open_checkpoint
from taskvec.core.admission import NO_LIMIT, Admission
from taskvec.core.embedder import AsyncEmbedder
from taskvec.core.health import ServiceHealth
from taskvec.core.job import EmbedJob
from taskvec.core.output_format import OutputFormat, OutputType
from taskvec.core.tasks import Task
from taskvec.engines.packed.engine import PackedEngine, PackedOptions
from taskvec.errors import InvalidRequestError
from taskvec.service import build_tokenizer, task_table


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
        device: str = "auto",
        dtype: str = "auto",
        adapter_mode: str = "auto",
        threads: int = 0,
    ) -> None:
        """Load a model and run the self-test of its adapters.

        Args:
            model: checkpoint folder, hub id, or the built-in ``taskvec-mini``.
            revision: hub branch, tag or commit; None for the default branch.
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
        checkpoint = open_checkpoint(model, revision)
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
        with ExitStack() as stack:
            self._portal = stack.enter_context(start_blocking_portal())
            self._portal.call(engine.start)
            stack.callback(tokenizer.close)
            stack.callback(self._portal.call, engine.stop)
            self._stack = stack.pop_all()

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
                ``text-matching``.
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
        result = self._portal.call(self._embedder.embed, job)
        return cast("NDArray[np.float32]", output.apply(result.vectors)[OutputType.FLOAT])

    def close(self) -> None:
        """Finish running calls, then free the model."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
