"""The library face: ``from taskvec import Embedder``."""

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
from taskvec.core.tasks import Task
from taskvec.engines.packed.engine import PackedEngine, PackedOptions
from taskvec.errors import InvalidRequestError
from taskvec.service import task_table, text_tokenizer


class Embedder:
    """Embeds texts in this process, with the vectors that the server would give.

    Example:
        >>> with Embedder() as embedder:
        ...     vectors = embedder.embed(["a text"], task="clustering", dimensions=128)
        >>> vectors.shape
        (1, 128)

    May be used from several threads at once: their texts share batches.
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
        """Load a model and prove its adapters.

        Args:
            model: a folder, a hub id, or the built-in ``taskvec-mini``.
            revision: hub branch, tag or commit.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            dtype: ``auto``, ``bfloat16``, ``float16`` or ``float32``.
            adapter_mode: ``auto``, ``merged`` or ``low-rank``.
            threads: processor threads; 0 for one per core.

        Raises:
            CheckpointError: the model cannot be served; the message names the cure.
        """
        if not structlog.is_configured():  # its own default prints every event to stdout
            structlog.configure(
                wrapper_class=structlog.make_filtering_bound_logger("warning"),
                logger_factory=structlog.PrintLoggerFactory(sys.stderr),
            )
        checkpoint = open_checkpoint(model, revision)
        options = PackedOptions(
            device=device, dtype=dtype, adapter_mode=adapter_mode, threads=threads
        )
        engine = PackedEngine(checkpoint, options)
        tokenizer = text_tokenizer(checkpoint, max_tokens=0, threads=1)
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
        """What is loaded."""
        return self._embedder.model

    @property
    def tasks(self) -> list[str]:
        """Names that ``task=`` takes."""
        return self._embedder.tasks.names

    def task(self, name: str | None = None) -> Task:
        """The adapter and the prompt that a task name, or None, stands for.

        Raises:
            InvalidRequestError: unknown task.
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
            texts: one text or several; none may be empty.
            task: one of ``tasks`` or an alias; None for ``text-matching``; or another pair of
                prompt and adapter.
            dimensions: keep the first so many values; None for all.
            normalized: scale each vector to length 1.
            truncate: True cuts texts that are too long, False refuses them.

        Returns:
            float32 [texts, dimensions].

        Raises:
            InvalidRequestError: unknown task, bad dimensions, an empty or over-long text.
        """
        items = [texts] if isinstance(texts, str) else list(texts)
        chosen = task if isinstance(task, Task) else self.task(task)
        for i, text in enumerate(items):
            if not isinstance(text, str) or not text:
                raise InvalidRequestError(
                    f"texts[{i}] must be a non-empty string.", code="invalid_input"
                )
        job = EmbedJob(
            inputs=items,
            task=chosen,
            dimensions=dimensions,
            normalized=normalized,
            truncate=truncate,
        )
        if not items:
            job.check_dimensions(self.model.dimension)
            return np.empty((0, dimensions or self.model.dimension), dtype=np.float32)
        vectors = self._portal.call(self._embedder.embed, job).vectors
        return cast("NDArray[np.float32]", vectors)

    def close(self) -> None:
        """Finish what is being embedded, then free the model."""
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
