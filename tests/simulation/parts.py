"""The parts of a service that a simulation replaces: weights, words, the network, the observers."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
import numpy as np
import torch

from simulation.network import CARD, Connector, Network, Vectors, right_vector
from simulation.threads import Threads
from taskvec.checkpoint.golden import GoldenVectors
from taskvec.core.tokenizer_queue import TokenizerQueue
from taskvec.engines.base import EngineResult, TokenBatch, TokenIds
from taskvec.engines.packed.engine import PackedEngine
from taskvec.engines.packed.scheduler import TokenBudget
from taskvec.engines.remote.engine import RemoteEngine
from taskvec.priority import Priority

KEEPALIVE_SECONDS = 3.0

PROBES = (np.arange(3, dtype=np.int32), np.arange(7, dtype=np.int32))

GOLDEN = GoldenVectors(
    PROBES,
    {
        adapter: np.stack([right_vector(probe, adapter) for probe in PROBES])
        for adapter in (None, *CARD.adapters)
    },
    CARD.adapters,
)


def word_ids(text: str, prompt: str) -> TokenIds:
    """Return the ids of a text: one a word."""
    words = (prompt + text).split()
    return np.array([zlib.crc32(word.encode()) % CARD.vocabulary for word in words], np.int32)


class SimulatedTokenizer:
    """The real queue of the tokenizer, with words for tokens.

    Attributes:
        queue: the real queue.
    """

    max_tokens = CARD.max_tokens

    def __init__(self, threads: Threads, workers: int, max_waiting: int) -> None:
        """Have ``workers`` threads, and a limit of characters that wait."""
        self._threads = threads
        self.queue = TokenizerQueue(
            workers, max_waiting, lambda _busy, _waiting: None, clock=threads.loop.time
        )

    async def encode(
        self, texts: Sequence[str], *, prompt: str, truncate: bool, priority: Priority
    ) -> list[TokenIds]:
        """As ``TextTokenizer.encode``."""
        assert not truncate
        if sum(map(len, texts)) < 100:
            return [word_ids(text, prompt) for text in texts]
        work = _Work(self._threads, texts, prompt)
        await self.queue.run(work, sum(map(len, texts)), priority)
        return work.ids

    def close(self) -> None:
        """End the threads."""
        self.queue.close()


class _Work:
    def __init__(self, threads: Threads, texts: Sequence[str], prompt: str) -> None:
        self.ids: list[TokenIds] = []
        self._threads = threads
        self._texts = texts
        self._prompt = prompt

    def step(self) -> tuple[int, bool]:
        """Tokenise some texts, in 1 to 5 milliseconds."""
        start = len(self.ids)
        texts = self._texts[start : start + 10]
        self._threads.sleep(self._threads.loop.random.uniform(1e-3, 5e-3))
        self.ids += [word_ids(text, self._prompt) for text in texts]
        return sum(map(len, texts)), len(self.ids) == len(self._texts)


STEPS = 4
"""Steps of a forward pass, before each of which it can be paused."""


@dataclass(frozen=True)
class _PausedTransformer:
    """The transformer of the bulk lane."""

    transformer: SimulatedTransformer
    step: Callable[[], None]
    device = torch.device("cpu")
    max_started = 1

    def start(
        self, ids: Sequence[TokenIds], adapters: Sequence[str | None]
    ) -> Callable[[], Vectors]:
        return self.transformer.start(ids, adapters, self.step)


class SimulatedTransformer:
    """Forward passes that take virtual time.

    Attributes:
        served: tokens of the forward passes so far, by class of no request in particular.
        failures: texts of forward passes that were made to fail.
        dies: whether the next forward pass ends the engine's thread.
        died: whether one has.
    """

    device = torch.device("cpu")
    threads = 1
    max_started = 1

    def __init__(self, threads: Threads, memory: int, failing: float) -> None:
        """Have room for a forward pass of ``memory`` tokens, and fail with a probability."""
        random = threads.loop.random
        self.served = 0
        self.failures = 0
        self.dies = self.died = False
        self.running = False
        self._rate = random.choice((2000.0, 20_000.0))
        self._threads = threads
        self._memory = memory
        self._failing = failing

    def in_lane(self, step: Callable[[], None], niceness: int) -> _PausedTransformer:
        """As ``Transformer.in_lane``."""
        assert niceness > 0
        return _PausedTransformer(self, step)

    def start(
        self,
        ids: Sequence[TokenIds],
        adapters: Sequence[str | None],
        step: Callable[[], None] = lambda: None,
    ) -> Callable[[], Vectors]:
        """As ``Transformer.start``; ``step`` is called between the steps."""
        tokens = sum(map(len, ids))
        if tokens > self._memory:
            raise torch.OutOfMemoryError("out of memory")
        if self.dies:
            self.died = True
            raise SystemExit("the thread ends")
        failing = self._threads.loop.random.random() < self._failing
        for _ in range(STEPS):
            step()
            self._threads.sleep((1e-3 + tokens / self._rate) / STEPS)
        if failing:
            self.failures += 1
            raise RuntimeError("a forward pass was made to fail")
        self.served += tokens
        vectors = np.stack([right_vector(*pair) for pair in zip(ids, adapters, strict=True)])
        return lambda: vectors


class SimulatedPackedEngine(PackedEngine):
    """The real engine with simulated weights."""

    def __init__(self, transformer: SimulatedTransformer, batch_tokens: int, observer: Any) -> None:
        """Have batches of ``batch_tokens`` tokens."""
        super().__init__(_CHECKPOINT, None, observer)
        self._transformer = transformer
        self._batch_tokens = batch_tokens

    def _load(self) -> Any:
        clock = self._transformer._threads.loop.time
        self._waiting.budget = TokenBudget(self._batch_tokens, clock)
        self._waiting.queue.quantum = max(1, self._batch_tokens // 4)
        return self._transformer


class SimulatedPool(RemoteEngine):
    """The real pool over a simulated network."""

    def __init__(self, network: Network, *arguments: Any) -> None:
        """Call servers of a network."""
        super().__init__(_CHECKPOINT, None, *arguments)  # type: ignore[arg-type]
        self._network = network

    def _session(
        self,
        connector: aiohttp.BaseConnector,  # noqa: ARG002 - nothing real is opened
    ) -> aiohttp.ClientSession:
        return super()._session(Connector(self._network, KEEPALIVE_SECONDS))


class WatchedEngine:
    """Passes calls on to an engine, and checks their answers and their turns.

    Attributes:
        engine: the real engine.
        calls: number of calls in progress.
        faults: sentences, one for each call that was not served as it must be.
    """

    def __init__(self, engine: Any) -> None:
        """Wrap an engine."""
        self.engine = engine
        self.calls = 0
        self.faults: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    async def embed(self, batch: TokenBatch) -> EngineResult:
        """See ``Engine.embed``."""
        self.calls += 1
        try:
            result: EngineResult = await self.engine.embed(self._timed(batch))
        finally:
            self.calls -= 1
        if result.vectors.shape != (len(batch.ids), CARD.dimension):
            self.faults.append(
                f"vectors of shape {result.vectors.shape} for {len(batch.ids)} texts"
            )
        return result

    def _timed(self, batch: TokenBatch) -> TokenBatch:
        """Return a batch that is a fault if it is small and many tokens are served before it.

        Each request that waits may get its quantum, and what its last text has beyond that, before
        a new one; the classes and the batches that are running add to that.
        """
        engine = self.engine
        if not isinstance(engine, SimulatedPackedEngine):
            return batch
        if batch.priority is Priority.BULK or batch.tokens > engine._waiting.queue.quantum:
            return batch
        transformer = engine._transformer
        waiting = [request.batch for request in engine._waiting.queue]
        longest = max((len(ids) for other in waiting for ids in other.ids), default=0)
        fair = (len(waiting) + 1) * (engine._waiting.queue.quantum + longest)
        bound = 1.25 * fair + 4 * engine._batch_tokens
        before = transformer.served

        def entered() -> None:
            batch.entered()
            served = transformer.served - before
            if served > bound:
                self.faults.append(f"{served} tokens were served before {batch.tokens}")

        return replace(batch, entered=entered)


class Observer:
    """Observer of engines, pools and caches: keeps what must end at zero.

    Attributes:
        queue: texts and tokens of the last report.
    """

    def __init__(self) -> None:
        """Start with an empty queue."""
        self.queue = (0, 0)

    def queue_changed(self, texts: int, tokens: int, oldest: float | None) -> None:
        """See ``QueueObserver``."""
        assert (oldest is None) == (texts == 0)
        self.queue = (texts, tokens)

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


class _Checkpoint:
    card = CARD


_CHECKPOINT: Any = _Checkpoint()
