"""vLLM's AsyncLLM in this process, behind the Engine protocol."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import signal
import time
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
from taskvec.engines.inflight import InFlight
from taskvec.engines.vllm.arguments import VllmOptions, engine_arguments
from taskvec.errors import CheckpointError, DeadlineExceededError, StartError, UnavailableError
from taskvec.priority import Priority

log = structlog.get_logger(__name__)

Vectors = NDArray[np.float32]

PRIORITIES = {Priority.INTERACTIVE: 0, Priority.BULK: 1}
"""Priorities of vLLM's scheduler, which always runs lower values first."""


class VllmEngine:
    """Engine that runs vLLM: one sequence per text, batched by vLLM, with adapters as LoRA."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        cache: Path,
        options: VllmOptions | None = None,
        observer: EngineObserver | None = None,
    ) -> None:
        """Create the engine; ``start`` loads the weights.

        Args:
            checkpoint: the checkpoint to serve.
            cache: folder for the copy for vLLM and for the golden vectors.
            options: how vLLM runs.
            observer: notified of the queue only, because vLLM does not report its forward passes.
        """
        self._checkpoint = checkpoint
        self._cache = cache
        self._options = options or VllmOptions()
        self._health = EngineHealth(EngineState.STARTING, "vLLM is loading the model")
        self._llm: Any = None
        self._started = False
        self._batch_tokens = 0
        self._adapters: dict[str, Any] = {}
        self._numbers = itertools.count()
        self._finished = 0
        self._in_flight = InFlight(observer)

    @property
    def model(self) -> ModelCard:
        """See ``Engine.model``."""
        return self._checkpoint.card

    @property
    def finished(self) -> int:
        """See ``Engine.finished``: the number of embedded texts."""
        return self._finished

    @property
    def batch_tokens(self) -> int:
        """See ``Engine.batch_tokens``: vLLM's max_num_batched_tokens; 0 before the start."""
        return self._batch_tokens

    def health(self) -> EngineHealth:
        """See ``Engine.health``."""
        if self._health.ready and self._llm.errored:
            self._health = EngineHealth(EngineState.DEAD, "vLLM's engine process died")
        return self._health

    async def start(self) -> None:
        """See ``Engine.start``."""
        started = time.monotonic()
        loop = asyncio.get_running_loop()
        try:
            golden = await loop.run_in_executor(None, golden_vectors, self._checkpoint, self._cache)
            arguments, self._llm = await loop.run_in_executor(None, self._load)
            await self._add_adapters()
            await self._check_adapters(golden)
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
            seconds=round(time.monotonic() - started, 2),
        )

    async def embed(self, batch: TokenBatch) -> EngineResult:
        """See ``Engine.embed``."""
        self.health().require_ready()
        if batch.deadline is not None and time.monotonic() > batch.deadline:
            raise DeadlineExceededError("The request's deadline passed before it was embedded.")
        started = time.monotonic()
        with self._in_flight.request(), self._in_flight.queued(len(batch.ids), batch.tokens):
            batch.entered()
            vectors = await self._embed_all(batch.ids, batch.adapter, batch.priority)
        # vLLM does not report how long a text was queued: all of the time counts as computed.
        return EngineResult(vectors, queued=0.0, computed=time.monotonic() - started)

    async def stop(self) -> None:
        """See ``Engine.stop``."""
        if self._health.state in (EngineState.READY, EngineState.STARTING):
            self._health = EngineHealth(EngineState.STOPPING, "it finishes the admitted requests")
        # Shutting vLLM down fails every request in progress, so all of them are awaited first.
        await self._in_flight.wait_idle()
        if self._started:
            await self._shut_down()
        self._health = EngineHealth(EngineState.DEAD, "stopped")

    def _load(self) -> tuple[dict[str, Any], Any]:
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # no unrequested network traffic
        folder = make_vllm_copy(self._checkpoint, self._cache)
        try:
            from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: PLC0415 - an extra
            from vllm.platforms import current_platform  # noqa: PLC0415
            from vllm.v1.engine.async_llm import AsyncLLM  # noqa: PLC0415
        except ModuleNotFoundError as missing:
            if missing.name != "vllm":
                raise
            raise StartError(
                "The vllm engine needs vLLM: install taskvec[vllm] in a separate environment."
            ) from None
        arguments = engine_arguments(
            self._checkpoint, folder, self._options, gpu=not current_platform.is_cpu()
        )
        # vLLM's processes inherit blocked termination signals: only this process receives them, and
        # it answers the admitted requests before it ends vLLM.
        resource_tracker.ensure_running()  # starting it later would unblock the signals
        blocked = {signal.SIGINT, signal.SIGTERM}
        signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        try:
            return arguments, AsyncLLM.from_engine_args(
                AsyncEngineArgs(disable_log_stats=True, **arguments)
            )
        except (RuntimeError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"vLLM did not start ({error}): see its log; check --memory-share, "
                "--max-batch-tokens and --vllm-args."
            ) from error
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)

    async def _add_adapters(self) -> None:
        from vllm.lora.request import LoRARequest  # noqa: PLC0415

        for number, adapter in enumerate(self._checkpoint.adapters, start=1):
            request = LoRARequest(adapter.name, number, str(adapter.weights.parent))
            if not await self._llm.add_lora(request):
                raise CheckpointError(f"vLLM did not load {adapter_label(adapter.name)}.")
            self._adapters[adapter.name] = request

    async def _check_adapters(self, golden: GoldenVectors) -> None:
        """Check the golden vectors of every adapter, in one mixed batch."""
        answers = await asyncio.gather(
            *(self._embed_all(golden.probes, adapter) for adapter in golden.adapters)
        )
        for adapter, vectors in zip(golden.adapters, answers, strict=True):
            mismatch = golden.mismatch(adapter, vectors)
            if mismatch is not None:
                raise CheckpointError(
                    f"vLLM gives wrong vectors for {self.model.name} on this device: {mismatch}. "
                    "Use --engine packed, which serves every task here, or stock vLLM with the "
                    "weights of one task merged."
                )

    async def _embed_all(
        self, ids: Any, adapter: str | None, priority: Priority = Priority.INTERACTIVE
    ) -> Vectors:
        # vLLM aborts a request when its task is cancelled, not when its generator is closed.
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
                request_id=f"taskvec-{next(self._numbers)}",  # ids of clients may not be unique
                lora_request=self._adapters[adapter] if adapter is not None else None,
                priority=PRIORITIES[priority],
            ):
                vector = output.outputs.data.float().numpy()
        except EngineDeadError:
            self._health = EngineHealth(EngineState.DEAD, "vLLM's engine process died")
            self._health.require_ready()
        if vector.shape != (self.model.dimension,):  # an aborted request ends without an error
            raise UnavailableError("vLLM aborted a text: send the request again.", retry_after=1)
        self._finished += 1
        return vector

    async def _shut_down(self) -> None:
        llm, self._llm, self._started = self._llm, None, False
        await asyncio.get_running_loop().run_in_executor(None, llm.shutdown)
        del llm
        gc.collect()  # its destructor must run before the interpreter unloads modules
