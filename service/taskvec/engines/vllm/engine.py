"""vLLM's AsyncLLM in this process, behind the Engine protocol."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import signal
import time
from collections import OrderedDict
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from taskvec.checkpoint.backbone import ModelCard
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.checkpoint.golden import GoldenVectors, adapter_label, golden_vectors
from taskvec.checkpoint.vllm_copy import make_vllm_copy
from taskvec.concurrency import gather_or_cancel
from taskvec.engines.base import (
    EngineHealth,
    EngineObserver,
    EngineResult,
    EngineState,
    TokenBatch,
    TokenIds,
)
from taskvec.engines.vllm.arguments import VllmOptions, engine_arguments
from taskvec.errors import CheckpointError, DeadlineExceededError, UnavailableError
from taskvec.priority import Priority

log = structlog.get_logger(__name__)

Vectors = NDArray[np.float32]

PRIORITIES = {Priority.INTERACTIVE: 0, Priority.BULK: 1}
"""VLLM's own: it takes the lower first, strictly."""


class VllmEngine:
    """Embeds with vLLM: one sequence a text, batched by vLLM's scheduler, adapters as LoRA."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        cache: Path,
        options: VllmOptions | None = None,
        observer: EngineObserver | None = None,
    ) -> None:
        """Prepare; nothing is loaded yet.

        Args:
            checkpoint: what to serve.
            cache: folder for the plain copy and the golden vectors.
            options: how vLLM runs.
            observer: told of what waits; vLLM does not tell of its forwards.
        """
        self._checkpoint = checkpoint
        self._cache = cache
        self._options = options or VllmOptions()
        self._observer = observer
        self._health = EngineHealth(EngineState.STARTING, "vLLM is loading the model")
        self._llm: Any = None
        self._started = False
        self._batch_tokens = 0
        self._adapters: dict[str, Any] = {}
        self._numbers = itertools.count()
        self._finished = 0
        self._texts = 0
        self._tokens = 0
        self._since: OrderedDict[int, float] = OrderedDict()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def model(self) -> ModelCard:
        """See ``Engine.model``."""
        return self._checkpoint.card

    @property
    def finished(self) -> int:
        """See ``Engine.finished``: texts."""
        return self._finished

    def health(self) -> EngineHealth:
        """See ``Engine.health``."""
        if self._health.ready and self._llm.errored:
            self._health = EngineHealth(EngineState.DEAD, "vLLM's engine process died")
        return self._health

    async def start(self) -> None:
        """See ``Engine.start``."""
        begun = time.monotonic()
        loop = asyncio.get_running_loop()
        try:
            golden = await loop.run_in_executor(None, golden_vectors, self._checkpoint, self._cache)
            arguments, self._llm = await loop.run_in_executor(None, self._load)
            await self._add_adapters()
            await self._prove(golden)
        except Exception as error:
            self._health = EngineHealth(EngineState.DEAD, str(error))
            if self._llm is not None:
                await self._shut_down()
            raise
        if self._health.state is not EngineState.STARTING:  # stopped while it was loading
            await self._shut_down()
            return
        self._started = True
        self._batch_tokens = arguments["max_num_batched_tokens"]
        self._health = EngineHealth(EngineState.READY)
        log.info(
            "engine_ready",
            model=self.model.name,
            engine="vllm",
            adapters=list(self._adapters),
            max_batch_tokens=arguments["max_num_batched_tokens"],
            max_batch_texts=arguments["max_num_seqs"],
            seconds=round(time.monotonic() - begun, 2),
        )

    async def embed(self, batch: TokenBatch) -> EngineResult:
        """See ``Engine.embed``."""
        self.health().require_ready()
        if batch.deadline is not None and time.monotonic() > batch.deadline:
            raise DeadlineExceededError("The request's deadline passed before it was embedded.")
        begun = time.monotonic()
        self._since[id(batch)] = begun
        self._count(len(batch.ids), batch.tokens)
        batch.entered()
        try:
            fits = batch.tokens <= self._batch_tokens
            vectors = await self._embed_all(
                batch.ids, batch.adapter, batch.priority if fits else Priority.BULK
            )
        finally:
            del self._since[id(batch)]
            self._count(-len(batch.ids), -batch.tokens)
        # vLLM does not say how long a text waited: all of it counts as computing.
        return EngineResult(vectors, queued=0.0, computed=time.monotonic() - begun)

    async def stop(self) -> None:
        """See ``Engine.stop``."""
        if self._health.state in (EngineState.READY, EngineState.STARTING):
            self._health = EngineHealth(EngineState.STOPPING, "it finishes what was admitted")
        # An abort inside vLLM fails every request in flight: drain here, then shut it down.
        await self._idle.wait()
        if self._started:
            await self._shut_down()
        self._health = EngineHealth(EngineState.DEAD, "stopped")

    def _load(self) -> tuple[dict[str, Any], Any]:
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # no connection that no one configured
        folder = make_vllm_copy(self._checkpoint, self._cache)
        try:
            from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: PLC0415 - an extra
            from vllm.platforms import current_platform  # noqa: PLC0415
            from vllm.v1.engine.async_llm import AsyncLLM  # noqa: PLC0415
        except ModuleNotFoundError as missing:
            if missing.name != "vllm":
                raise
            raise CheckpointError(
                "The vllm engine needs vLLM: install taskvec[vllm], in an environment of its own."
            ) from None
        arguments = engine_arguments(
            self._checkpoint, folder, self._options, gpu=not current_platform.is_cpu()
        )
        # vLLM's processes are born with the signals of a terminal and an orchestrator blocked:
        # only this process hears them, drains, and then ends vLLM.
        resource_tracker.ensure_running()  # its start would unblock them again
        blocked = {signal.SIGINT, signal.SIGTERM}
        signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        try:
            return arguments, AsyncLLM.from_engine_args(
                AsyncEngineArgs(disable_log_stats=True, **arguments)
            )
        except (RuntimeError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"vLLM did not start ({error}): its log says why; see --memory-share, "
                "--max-batch-tokens and --vllm-args."
            ) from error
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)

    async def _add_adapters(self) -> None:
        from vllm.lora.request import LoRARequest  # noqa: PLC0415

        for number, adapter in enumerate(self._checkpoint.adapters, start=1):
            request = LoRARequest(adapter.name, number, str(adapter.weights.parent))
            if not await self._llm.add_lora(request):
                raise CheckpointError(f"vLLM did not take {adapter_label(adapter.name)}.")
            self._adapters[adapter.name] = request

    async def _prove(self, golden: GoldenVectors) -> None:
        """Every adapter gives its golden vectors, all of them in one mixed batch."""
        answers = await asyncio.gather(
            *(self._embed_all(golden.probes, adapter) for adapter in golden.adapters)
        )
        for adapter, vectors in zip(golden.adapters, answers, strict=True):
            mismatch = golden.mismatch(adapter, vectors)
            if mismatch is not None:
                raise CheckpointError(
                    f"vLLM serves {self.model.name} wrongly on this device: {mismatch}. Nothing is "
                    "served instead of wrong vectors. --engine packed serves every task here; "
                    "stock vLLM with one task's weights merged serves that task."
                )

    async def _embed_all(
        self, ids: Any, adapter: str | None, priority: Priority = Priority.INTERACTIVE
    ) -> Vectors:
        # Cancelling the tasks, not closing the generators, is what aborts in vLLM.
        return np.stack(
            await gather_or_cancel(self._embed_one(text, adapter, priority) for text in ids)
        )

    async def _embed_one(self, ids: TokenIds, adapter: str | None, priority: Priority) -> Vectors:
        from vllm import PoolingParams  # noqa: PLC0415
        from vllm.inputs import tokens_input  # noqa: PLC0415
        from vllm.v1.engine.exceptions import EngineDeadError  # noqa: PLC0415

        vector = np.empty(0, dtype=np.float32)
        try:
            async for output in self._llm.encode(
                tokens_input(ids.tolist()),
                PoolingParams(task="embed", use_activation=False),
                request_id=f"taskvec-{next(self._numbers)}",  # a client's own could repeat
                lora_request=self._adapters[adapter] if adapter is not None else None,
                priority=PRIORITIES[priority],
            ):
                vector = output.outputs.data.float().numpy()
        except EngineDeadError:
            self._health = EngineHealth(EngineState.DEAD, "vLLM's engine process died")
            self._health.require_ready()
        if vector.shape != (self.model.dimension,):  # an aborted request ends without an error
            raise UnavailableError("vLLM gave up on a text: send the request again.", retry_after=1)
        self._finished += 1
        return vector

    def _count(self, texts: int, tokens: int) -> None:
        self._texts += texts
        self._tokens += tokens
        if self._texts:
            self._idle.clear()
        else:
            self._idle.set()
        if self._observer is not None:
            oldest = next(iter(self._since.values()), None)
            self._observer.queue_changed(self._texts, self._tokens, oldest)

    async def _shut_down(self) -> None:
        llm, self._llm, self._started = self._llm, None, False
        await asyncio.get_running_loop().run_in_executor(None, llm.shutdown)
        del llm
        gc.collect()  # its destructor must run before the interpreter takes its modules away
