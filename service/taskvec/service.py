"""From a checkpoint and the settings to the parts that they decide."""

from __future__ import annotations

import os
from typing import Any

from taskvec.auth.keys import KeyLimits, KeySource
from taskvec.cache.embeddings import CacheObserver, EmbeddingCache, VectorStore
from taskvec.cache.memory import MemoryStore
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.checkpoint.golden import content_digest
from taskvec.core.tasks import TaskTable
from taskvec.core.tokenizer import TextTokenizer, TokenizerObserver
from taskvec.engines.base import Engine
from taskvec.errors import CheckpointError
from taskvec.settings import EngineKind, Settings


def task_table(checkpoint: Checkpoint) -> TaskTable:
    """The tasks that a checkpoint offers."""
    own = {adapter.name: adapter.prompts for adapter in checkpoint.adapters}
    return TaskTable(checkpoint.card.adapters, checkpoint.prompts, checkpoint.default_prompt, own)


def served_name(settings: Settings, checkpoint: Checkpoint) -> str:
    """The name that clients ask for."""
    return settings.served_model_name or checkpoint.card.name


def text_tokenizer(
    checkpoint: Checkpoint,
    *,
    max_tokens: int,
    threads: int,
    observer: TokenizerObserver | None = None,
) -> TextTokenizer:
    """A checkpoint's tokenizer.

    Args:
        checkpoint: whose.
        max_tokens: 0 for the model's own limit.
        threads: 0 for one per core, at most 4.
        observer: see ``TextTokenizer``.
    """
    card = checkpoint.card
    return TextTokenizer(
        checkpoint.tokenizer,
        max_tokens=min(max_tokens or card.max_tokens, card.max_tokens),
        vocabulary=card.vocabulary,
        threads=threads or min(4, os.cpu_count() or 1),
        observer=observer,
    )


def answer_cache(
    settings: Settings, checkpoint: Checkpoint, observer: CacheObserver
) -> EmbeddingCache | None:
    """The cache that the settings ask for; None where they ask for none.

    Raises:
        StartError: its address cannot be used.
    """
    arithmetic = (settings.engine, settings.device, settings.dtype, settings.adapter_mode)
    identity = " ".join(arithmetic).encode()
    store: VectorStore
    if settings.answer_cache_url is not None:
        from taskvec.cache.redis import RedisStore  # noqa: PLC0415 - redis is slow to load

        # Others with other weights may use it, too.
        identity += f" {content_digest(checkpoint)}".encode()
        store = RedisStore(settings.answer_cache_url, settings.answer_cache_ttl, observer)
    elif settings.answer_cache_bytes:
        store = MemoryStore(settings.answer_cache_bytes, observer)
    else:
        return None
    return EmbeddingCache(
        store,
        identity=identity,
        dimension=checkpoint.card.dimension,
        shared=settings.answer_cache_shared,
        observer=observer,
    )


def make_engine(
    settings: Settings, checkpoint: Checkpoint, observer: Any, *, reports_queue: bool = True
) -> Engine:
    """The engine that the settings ask for; not started.

    Args:
        settings: which, and how it runs.
        checkpoint: what it serves.
        observer: what it reports to.
        reports_queue: see ``RemoteOptions``.

    Raises:
        CheckpointError: what it needs is not installed.
    """
    if settings.engine is EngineKind.REMOTE:
        return _remote_engine(settings, checkpoint, observer, reports_queue=reports_queue)
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
        raise CheckpointError("The packed engine needs torch: install taskvec[packed].") from None
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


def _remote_engine(
    settings: Settings, checkpoint: Checkpoint, observer: Any, *, reports_queue: bool
) -> Engine:
    from taskvec.engines.remote.engine import RemoteEngine, RemoteOptions  # noqa: PLC0415

    key = settings.engine_api_key
    options = RemoteOptions(
        urls=settings.engine_url,
        api_key=key.get_secret_value() if key else None,
        ca=settings.engine_ca,
        max_tokens=settings.max_tokens,
        call_seconds=settings.engine_call_timeout,
        reports_queue=reports_queue,
    )
    return RemoteEngine(checkpoint, settings.cache, options, observer)


def key_source(settings: Settings) -> KeySource | None:
    """Where the API keys are; None where none are asked for."""
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
