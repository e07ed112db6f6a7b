"""One budget of bytes for the requests of a process: bodies, texts, token ids, vectors, answers.

Each request has a ``MemoryHold``, which follows what it keeps in memory. A client may hold as much
as it leaves free (the dynamic threshold of Choudhury and Hahne, 1998, with factor 1): one client
alone half of the budget, two clients a third each, and a client that comes later finds room.
"""

from __future__ import annotations

from taskvec.errors import QueueFullError

FREE_BYTES = 8192
"""A request with no more than this is not counted, so that a short one costs nothing."""

LIMIT_SHARE = 6
"""The default budget is the memory limit divided by this: a server with the default model takes
about 450 MB without requests, and 1,200 MB are to suffice."""

MIN_BUDGET, MAX_BUDGET = 128 << 20, 256 << 20
"""Bounds of the default budget in bytes."""

RETRY_SECONDS = 1.0
"""Retry-After of a request that does not fit."""


def default_budget(total: int) -> int:
    """Return the budget in bytes for a process that may have ``total`` bytes; 0 if not known."""
    return min(MAX_BUDGET, max(MIN_BUDGET, total // LIMIT_SHARE)) if total else MAX_BUDGET


class MemoryBudget:
    """Counts the bytes of all requests; belongs to one event loop.

    Attributes:
        max_bytes: the budget.
        used: bytes held.
        closed: whether every growth is refused, because the process has no memory left.
    """

    def __init__(self, max_bytes: int) -> None:
        """Start with nothing held."""
        self.max_bytes = max_bytes
        self.used = 0
        self.closed = False
        self._clients: dict[str, int] = {}

    def hold(self, client: str) -> MemoryHold:
        """Return the hold of a new request, of no bytes yet.

        Args:
            client: whose request it is, see ``core.client_shares``.
        """
        return MemoryHold(self, client)

    def change(self, client: str, by: int) -> None:
        """Count more or fewer bytes of a client, without a check."""
        self.used += by
        held = self._clients.get(client, 0) + by
        if held:
            self._clients[client] = held
        else:
            self._clients.pop(client, None)

    def require_room(self, client: str, more: int, own: int) -> None:
        """Refuse a request that grows beyond its client's share.

        A request is admitted whatever its size if nothing else is held: its size is limited
        elsewhere.

        Args:
            client: whose request it is.
            more: bytes by which it grows.
            own: bytes that it holds.

        Raises:
            QueueFullError: the client holds too much.
        """
        held = self._clients.get(client, 0) + more
        free = self.max_bytes - self.used - more
        if not self.closed and (held <= free or self.used == own):
            return
        raise QueueFullError(
            f"Requests of all clients hold {self.used >> 20} of {self.max_bytes >> 20} MB in this "
            f"process, {held - more >> 20} MB of them yours, and {(more >> 20) + 1} MB more would "
            "exceed your share: send it again later, or fewer texts at once, and read the answers.",
            retry_after=RETRY_SECONDS,
        )


class MemoryHold:
    """What one request holds of the budget, until ``release``.

    Attributes:
        bytes: counted for the request.
    """

    __slots__ = ("_budget", "_client", "bytes")

    def __init__(self, budget: MemoryBudget, client: str) -> None:
        """Hold nothing yet."""
        self._budget = budget
        self._client = client
        self.bytes = 0

    def resize(self, size: int) -> None:
        """Hold ``size`` bytes from now on.

        Raises:
            QueueFullError: see ``MemoryBudget.require_room``; the hold is as before.
        """
        if size <= FREE_BYTES:
            size = 0
        more = size - self.bytes
        if not more:
            return
        if more > 0:
            self._budget.require_room(self._client, more, self.bytes)
        self._budget.change(self._client, more)
        self.bytes = size

    def shrink(self, size: int) -> None:
        """Hold at most ``size`` bytes from now on."""
        if size < self.bytes:
            self.resize(size)

    def release(self) -> None:
        """Return all bytes; no effect the second time."""
        if self.bytes:
            self._budget.change(self._client, -self.bytes)
            self.bytes = 0

    def unread(self, size: int) -> MemoryHold:
        """Return another hold of the same client, for an answer that it has not read yet.

        Args:
            size: bytes; counted even beyond the client's share, for the answer exists.
        """
        hold = MemoryHold(self._budget, self._client)
        if size:
            self._budget.change(self._client, size)
            hold.bytes = size
        return hold
