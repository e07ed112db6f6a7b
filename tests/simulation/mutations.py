"""Faults that are put into the code, to show that the simulation finds them.

A fault is a change of one function's source, which stays in force while the context is open.
"""

from __future__ import annotations

import importlib
import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch


@dataclass(frozen=True)
class Mutation:
    """A change of a method's source.

    Attributes:
        name: what is wrong then.
        where: module and method, as ``core.admission:Admission.admit``.
        old: a part of the source.
        new: what stands there instead.
    """

    name: str
    where: str
    old: str
    new: str

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Use the changed method.

        Raises:
            LookupError: the source has no such part; the mutation must follow the code.
        """
        path, _, qualified = self.where.partition(":")
        module = importlib.import_module(f"taskvec.{path}")
        owner_name, _, method = qualified.partition(".")
        owner = getattr(module, owner_name)
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(getattr(owner, method))))
        if self.old not in source:
            raise LookupError(f"{self.where} has no {self.old!r}")
        namespace: dict[str, Any] = {}
        code = "from __future__ import annotations\n" + source.replace(self.old, self.new)
        exec(code, vars(module), namespace)  # noqa: S102 - our own source
        with patch.object(owner, method, namespace[method]):
            yield


MUTATIONS = (
    Mutation(
        "an admitted request gives no tokens back",
        "core.admission:Admission.admit",
        "self._tokens[priority] -= tokens",
        "pass",
    ),
    Mutation(
        "a client's share is not given back",
        "core.client_shares:ClientShares.hold",
        "if not counted[0].requests:",
        "if False:",
    ),
    Mutation(
        "a caller that has gone is answered",
        "engines.packed.worker:Request._resolve",
        "if self.future.done():",
        "if False:",
    ),
    Mutation(
        "a waiting engine is not woken",
        "engines.packed.engine:PackedEngine.embed",
        "self._notify(batch.priority)",
        "pass",
    ),
    Mutation(
        "the class that has had most goes first",
        "engines.packed.scheduler:FairQueue.turn",
        "return min(",
        "return max(",
    ),
    Mutation(
        "a tokenizer thread that ends counts as working",
        "core.tokenizer_queue:TokenizerQueue._serve",
        "self._workers -= 1",
        "pass",
    ),
    Mutation(
        "a request that is not tokenised yet is not queued again",
        "core.tokenizer_queue:TokenizerQueue._serve",
        "heapq.heappush(self._classes[request.priority].waiting, request)",
        "pass",
    ),
    Mutation(
        "a call of a crashed server is not sent again",
        "engines.remote.engine:RemoteEngine._send",
        "len(tried) >= MAX_ATTEMPTS",
        "len(tried) >= 1",
    ),
    Mutation(
        "the callers of a shared call get each other's vectors",
        "engines.remote.batcher:CallBatcher._run",
        "vectors[start:stop]",
        "vectors[::-1][start:stop]",
    ),
    Mutation(
        "a call gives no connection back",
        "engines.remote.client:ServerClient._exchange",
        "self._connections.release()",
        "pass",
    ),
    Mutation(
        "a server is used after its crash without a check",
        "engines.remote.pool_server:PoolServer._check_and_watch",
        "await self._check()",
        "if self._protocol is None: await self._check()",
    ),
    Mutation(
        "the calls of a server that is found wrong are answered",
        "engines.remote.pool_server:PoolServer._doubt",
        "if wrong or",
        "if False and",
    ),
)
