"""The service: every part of a process, built once from the settings, and its lifecycle."""

from __future__ import annotations

import asyncio
import enum
import math
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import structlog

from taskvec import __version__
from taskvec.auth.keys import KeyLimits, KeySource, WatchedKeys
from taskvec.cache.embeddings import CacheObserver, EmbeddingCache, VectorStore
from taskvec.cgroups import available_cores
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.checkpoint.golden import content_digest
from taskvec.checkpoint.open import open_checkpoint
from taskvec.concurrency import (
    BackgroundTaskError,
    BackgroundTasks,
    LargeWork,
    run_in_thread,
)
from taskvec.core.admission import Admission, measure_speed
from taskvec.core.embedder import AsyncEmbedder
from taskvec.core.health import ServiceHealth
from taskvec.core.memory_budget import MemoryBudget, default_budget
from taskvec.core.memory_pressure import MemoryPressure
from taskvec.core.tasks import ServedNames, TaskTable
from taskvec.core.tokenizer import MAX_WAITING_CHARACTERS, TextTokenizer, TokenizerObserver
from taskvec.engines.base import Engine, EngineState
from taskvec.engines.process.client import ProcessEngine
from taskvec.errors import StartError
from taskvec.malloc import trim_malloc
from taskvec.memory_limits import MemoryLimits, MemoryUse
from taskvec.open_files import divide_open_files
from taskvec.settings import (
    KEY_SETTINGS,
    EngineKind,
    LimitsDown,
    Settings,
    environment_variable,
)
from taskvec.telemetry.interpreter_lock import InterpreterLockMonitor
from taskvec.telemetry.logs import RequestLog
from taskvec.telemetry.tracing import Tracer, make_tracer

if TYPE_CHECKING:  # imported when a service is built: the library needs none of them
    from taskvec.auth.rate_limit import RateLimiter
    from taskvec.metrics.registry import Metrics

STATE_KEY = "service"
"""Key of the service in the ASGI lifespan state, where the server finds it."""

START_WAIT = 10.0
"""Seconds to wait for a starting engine before serving anyway. A gateway process accepts no
connections meanwhile: the others on the same socket take them, instead of this one refusing."""

POLL_INTERVAL = 0.02
"""Seconds between two checks of an engine that is starting."""

FIRST_MEASURE_PAUSE, MAX_MEASURE_PAUSE = 0.5, 30.0
"""Seconds until the engine is measured again after a failed attempt; they double each time."""

log = structlog.get_logger(__name__)


class Role(enum.Enum):
    """What a process does for the service.

    STANDALONE is the only gateway. With several, each is a GATEWAY. Where the engine is makes no
    difference: it may be in the process, or in one of its own.
    """

    STANDALONE = "standalone"
    GATEWAY = "gateway"


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """Every part of one process.

    Attributes:
        budget: bytes that requests hold.
        pressure: refuses requests when memory is short.
        keys: API keys in force; None if none are required.
        limiter: counts what each key uses; None without keys.
        tracer: None if traces are off.
        request_log: None if requests are not logged.
        large_work: parses and writes what would block the event loop.
    """

    settings: Settings
    role: Role
    checkpoint: Checkpoint
    engine: Engine
    embedder: AsyncEmbedder
    admission: Admission
    health: ServiceHealth
    budget: MemoryBudget
    pressure: MemoryPressure
    names: ServedNames
    metrics: Metrics
    keys: WatchedKeys | None
    limiter: RateLimiter | None
    tracer: Tracer | None
    request_log: RequestLog | None
    large_work: LargeWork = field(default_factory=LargeWork)

    @asynccontextmanager
    async def running(self, on_failure: Callable[[BaseException], None]) -> AsyncIterator[None]:
        """Start the engine and the background tasks; on exit, stop them after the last request.

        Args:
            on_failure: called with the error if the engine does not start, and with a
                ``BackgroundTaskError`` if a background task cannot be kept running; ends the
                process.
        """

        def give_up(error: BackgroundTaskError) -> None:
            self.health.report_defect(str(error))
            on_failure(error)

        starting = asyncio.create_task(self._start_engine(on_failure))
        background = BackgroundTasks(give_up)
        background.start("measure engine", self._measure_engine, may_end=True)
        background.start("watch engine", self.health.watch)
        background.start("watch memory", self.pressure.watch)
        if self.keys is not None:
            background.start("watch keys", self.keys.watch)
        await self._wait_for_engine(START_WAIT if self.role is Role.GATEWAY else 0.0)
        try:
            with InterpreterLockMonitor(self.metrics.lock_held):
                yield
        finally:
            await background.stop()
            if self.limiter is not None:
                await self.limiter.close()
            await self.engine.stop()
            await starting
            await self.embedder.close()
            self.pressure.close()
            if self.tracer is not None:
                await asyncio.to_thread(self.tracer.close)

    async def _start_engine(self, on_failure: Callable[[BaseException], None]) -> None:
        try:
            await self.engine.start()
        except Exception as error:  # noqa: BLE001 - the process must end, whatever the error is
            on_failure(error)

    async def _wait_for_engine(self, seconds: float) -> None:
        limit = time.monotonic() + seconds
        # An engine has no event for the end of its start, only its health.
        while self.engine.health().state is EngineState.STARTING and time.monotonic() < limit:  # noqa: ASYNC110
            await asyncio.sleep(POLL_INTERVAL)

    async def _measure_engine(self) -> None:
        """Derive the queue's token budget from the engine's measured speed.

        Until the engine is ready and was measured, the default budget holds.
        """
        await self._wait_for_engine(math.inf)
        pause = FIRST_MEASURE_PAUSE
        while True:
            health = self.engine.health()
            if not self.admission.derived or health.state is EngineState.DEAD:
                return
            if not health.ready:
                await asyncio.sleep(FIRST_MEASURE_PAUSE)
                continue
            await self.admission.wait_for_quiet()
            try:
                tokens, seconds = await measure_speed(self.engine)
                break
            except Exception as error:  # noqa: BLE001 - it is measured again
                log.warning("engine_not_measured", reason=str(error), retry_seconds=pause)
            await asyncio.sleep(pause)
            pause = min(MAX_MEASURE_PAUSE, 2 * pause)
        self.admission.set_rate(tokens, seconds)
        await run_in_thread(trim_malloc)  # the largest batch so far: 40 MB of the default model
        log.info(
            "engine_measured",
            tokens_per_second=round(self.admission.rate),
            max_queue_tokens=self.admission.budget,
        )


def build_service(
    settings: Settings,
    role: Role = Role.STANDALONE,
    *,
    checkpoint: Checkpoint | None = None,
    metrics: Metrics | None = None,
    engine: Engine | None = None,
    tokenizer: TextTokenizer | None = None,
    request_log: RequestLog | None = None,
    limits: MemoryLimits | None = None,
) -> Service:
    """Build every part of a process; nothing is started.

    Args:
        settings: how to serve.
        role: what this process does.
        checkpoint: None opens the one in the settings.
        metrics: None makes new ones.
        engine: None builds the one in the settings.
        tokenizer: None builds the checkpoint's.
        request_log: log of requests, if they are logged; None logs them by structlog.
        limits: memory limits; None reads those of this process.

    Raises:
        StartError: the model cannot be served, the keys cannot be read, or traces not be sent.
    """
    # prometheus_client reads the folder that processes share when it is imported: not before.
    from taskvec.auth.rate_limit import RateLimiter  # noqa: PLC0415
    from taskvec.metrics.registry import Metrics  # noqa: PLC0415

    checkpoint = checkpoint or open_checkpoint(
        settings.model, settings.revision, settings.task_name
    )
    tasks = task_table(checkpoint)
    if checkpoint.merged_task is not None and checkpoint.merged_task.assumed:
        log.warning(
            "task_assumed",
            tasks=tasks.names,
            reason=f"{checkpoint.card.name} does not say which task its weights are for",
            remedy="set --task-name",
        )
    metrics = metrics or Metrics(tasks.names)
    names = ServedNames(settings.served_model_name or checkpoint.card.name, settings.model_aliases)
    metrics.describe(
        version=__version__,
        model=names.primary,
        engine=settings.engine.value,
    )
    engine = engine or build_engine(settings, checkpoint, metrics)
    tokenizer = tokenizer or build_tokenizer(
        checkpoint,
        max_tokens=settings.max_tokens,
        threads=settings.tokenizer_threads,
        observer=metrics,
    )
    admission = Admission(
        settings.max_queue_tokens, settings.queue_seconds, settings.max_queue_requests
    )
    limits = limits or MemoryLimits()
    budget = MemoryBudget(settings.memory_budget or default_budget(limits.total()))
    metrics.memory_budget(budget.max_bytes)
    pressure = MemoryPressure(limits, budget, metrics, engine=lambda: process_memory(engine))
    health = ServiceHealth(
        engine,
        stall_seconds=settings.stall_timeout,
        dead_seconds=settings.dead_timeout,
        canary_seconds=settings.canary_interval,
        memory_used_up=lambda: pressure.unready,
    )
    source = key_source(settings)
    return Service(
        settings=settings,
        role=role,
        checkpoint=checkpoint,
        engine=engine,
        embedder=AsyncEmbedder(
            engine,
            tokenizer,
            tasks,
            admission,
            health,
            cache=build_cache(settings, checkpoint, metrics, engine),
        ),
        admission=admission,
        health=health,
        budget=budget,
        pressure=pressure,
        names=names,
        metrics=metrics,
        keys=None if source is None else WatchedKeys(source, metrics.keys_changed),
        limiter=None
        if source is None
        else RateLimiter(
            settings.limits_url,
            open_when_down=settings.limits_down is LimitsDown.OPEN,
            observer=metrics,
        ),
        tracer=make_tracer(names.primary) if settings.traces else None,
        request_log=(request_log or RequestLog()) if settings.log_requests else None,
    )


def process_memory(engine: Engine) -> MemoryUse | None:
    """Return the memory limit of an engine's own process and its use; None if there is none."""
    return engine.memory if isinstance(engine, ProcessEngine) else None


def task_table(checkpoint: Checkpoint) -> TaskTable:
    """Return the tasks that a checkpoint offers."""
    own = {adapter.name: adapter.prompts for adapter in checkpoint.adapters}
    return TaskTable(
        checkpoint.card.adapters,
        checkpoint.prompts,
        checkpoint.default_prompt,
        own,
        checkpoint.merged_task,
    )


def build_tokenizer(
    checkpoint: Checkpoint,
    *,
    max_tokens: int,
    threads: int,
    max_waiting: int = MAX_WAITING_CHARACTERS,
    observer: TokenizerObserver | None = None,
) -> TextTokenizer:
    """Build a checkpoint's tokenizer.

    Args:
        checkpoint: contains tokenizer.json and the model's limits.
        max_tokens: maximum tokens of a text; 0 for the model's own limit.
        threads: requests tokenised at the same time; 0 for one per core, at most 4.
        max_waiting: characters of a priority class that may wait for the tokenizer.
        observer: see ``TextTokenizer``.

    Raises:
        CheckpointError: tokenizer.json cannot be used.
    """
    card = checkpoint.card
    return TextTokenizer(
        checkpoint.tokenizer,
        max_tokens=min(max_tokens or card.max_tokens, card.max_tokens),
        vocabulary=card.vocabulary,
        threads=threads or min(4, available_cores()),
        max_waiting=max_waiting,
        observer=observer,
    )


def build_cache(
    settings: Settings,
    checkpoint: Checkpoint,
    observer: CacheObserver,
    engine: Engine | None = None,
) -> EmbeddingCache | None:
    """Build the embedding cache; None if the settings configure none.

    Vectors of an engine with servers are stored after the servers were checked again.

    Raises:
        StartError: the URL of its Redis cannot be used.
    """
    numerics = (settings.engine, settings.device, settings.dtype, settings.adapter_mode)
    identity = " ".join(numerics).encode()
    store: VectorStore
    if settings.answer_cache_url is not None:
        from taskvec.cache.redis import RedisStore  # noqa: PLC0415 - redis is slow to import

        # Services with other weights may share the same Redis.
        identity += f" {content_digest(checkpoint)}".encode()
        store = RedisStore(settings.answer_cache_url, settings.answer_cache_ttl, observer)
    elif settings.answer_cache_bytes:
        from taskvec.cache.memory import MemoryStore  # noqa: PLC0415

        store = MemoryStore(settings.answer_cache_bytes, observer)
    else:
        return None
    if settings.engine is EngineKind.REMOTE:
        from taskvec.cache.proven import ProvenStore  # noqa: PLC0415 - only where it is used
        from taskvec.engines.remote.engine import RemoteEngine  # noqa: PLC0415

        if isinstance(engine, RemoteEngine):
            store = ProvenStore(store)
            engine.watch_proofs(store)
    return EmbeddingCache(
        store,
        identity=identity,
        dimension=checkpoint.card.dimension,
        shared=settings.answer_cache_shared,
        observer=observer,
    )


def key_source(settings: Settings) -> KeySource | None:
    """Return where the API keys are; None if none are configured.

    Raises:
        StartError: a variable for keys is set and empty, as when a secret could not be read.
    """
    for name in KEY_SETTINGS:
        variable = environment_variable(name)
        if getattr(settings, name) is None and os.environ.get(variable) == "":
            raise StartError(
                f"{variable} is set and empty, so that everybody would have access without a key: "
                "give it a value, or unset it to serve without keys."
            )
    if settings.keys_file is None and settings.api_keys is None:
        return None
    return KeySource(
        settings.keys_file,
        settings.api_keys.get_secret_value() if settings.api_keys else "",
        KeyLimits(
            settings.key_requests_per_minute,
            settings.key_tokens_per_minute,
            settings.key_concurrency,
        ),
    )


def build_engine(settings: Settings, checkpoint: Checkpoint, observer: Any) -> Engine:
    """Build the engine in the settings, in this process; it is not started.

    Args:
        settings: which engine, and how it runs.
        checkpoint: the model.
        observer: notified of the engine's work; see ``EngineObserver`` and ``PoolObserver``.

    Raises:
        StartError: a package that it needs is not installed.
    """
    if settings.engine is EngineKind.REMOTE:
        return _remote_engine(settings, checkpoint, observer)
    if settings.engine is EngineKind.VLLM:
        return _vllm_engine(settings, checkpoint, observer)
    return _packed_engine(settings, checkpoint, observer)


def _packed_engine(settings: Settings, checkpoint: Checkpoint, observer: Any) -> Engine:
    try:
        from taskvec.engines.packed.engine import (  # noqa: PLC0415 - torch is an extra
            PackedEngine,
            PackedOptions,
        )
    except ModuleNotFoundError as missing:
        if missing.name != "torch":
            raise
        raise StartError("The packed engine needs torch: install taskvec[packed].") from None
    options = PackedOptions(
        device=settings.device,
        dtype=settings.dtype,
        adapter_mode=settings.adapter_mode,
        max_batch_tokens=settings.max_batch_tokens,
        threads=settings.threads,
    )
    return PackedEngine(checkpoint, options, observer)


def _vllm_engine(settings: Settings, checkpoint: Checkpoint, observer: Any) -> Engine:
    from taskvec.engines.vllm.arguments import VllmOptions  # noqa: PLC0415
    from taskvec.engines.vllm.engine import VllmEngine  # noqa: PLC0415

    options = VllmOptions(
        dtype=settings.dtype,
        max_tokens=settings.max_tokens,
        max_batch_tokens=settings.max_batch_tokens,
        max_batch_texts=settings.max_batch_texts,
        memory_share=settings.memory_share,
        tensor_parallel=settings.tensor_parallel,
        data_parallel=settings.data_parallel,
        extra=settings.vllm_args,
    )
    return VllmEngine(checkpoint, settings.cache, options, observer)


def _remote_engine(settings: Settings, checkpoint: Checkpoint, observer: Any) -> Engine:
    from taskvec.engines.remote.engine import RemoteEngine, RemoteOptions  # noqa: PLC0415

    key = settings.engine_api_key
    options = RemoteOptions(
        urls=settings.engine_url,
        api_key=key.get_secret_value() if key else None,
        ca=settings.engine_ca,
        max_tokens=settings.max_tokens,
        call_seconds=settings.engine_call_timeout,
        connections=divide_open_files(settings.max_connections, remote=True).engines,
    )
    return RemoteEngine(checkpoint, settings.cache, options, observer)
