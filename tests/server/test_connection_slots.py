"""Which connection is closed when all slots are taken."""

from __future__ import annotations

from dataclasses import dataclass, field

from taskvec.server.protocol import ConnectionLimits, ConnectionSlots


@dataclass(eq=False)
class Connection:
    """A connection that notes that it was closed."""

    name: str
    closed: list[str] = field(repr=False)
    flushed: bool = True

    def close(self) -> None:
        self.closed.append(self.name)


def slots(connections: int) -> ConnectionSlots:
    return ConnectionSlots(
        ConnectionLimits(
            header_seconds=1,
            header_bytes=1,
            answer_seconds=1,
            connections=connections,
            discarded_bytes=1,
        )
    )


def test_idle_connections_go_before_few_handshakes() -> None:
    """Clients that connect at the same time do not close each other's handshakes."""
    taken, closed = slots(8), []
    for name in ("idle 1", "idle 2"):
        taken.mark_idle(Connection(name, closed))
    for name in ("new 1", "new 2"):
        taken.mark_handshake(Connection(name, closed))
        assert taken.evict_idle()
    assert closed == ["idle 1"] * 2


def test_many_handshakes_go_first() -> None:
    """Where handshakes hold more than a quarter of the slots, the oldest one is closed."""
    taken, closed = slots(8), []
    taken.mark_idle(Connection("idle", closed))
    for name in ("silent 1", "silent 2", "silent 3"):
        taken.mark_handshake(Connection(name, closed))
    assert taken.evict_idle()
    assert closed == ["silent 1"]


def test_a_response_that_is_being_sent_is_not_cut_off() -> None:
    """A connection with unsent bytes is not closed; without another one, none is."""
    taken, closed = slots(2), []
    sending = Connection("sending", closed, flushed=False)
    taken.mark_idle(sending)
    assert not taken.evict_idle()
    taken.mark_idle(Connection("idle", closed))
    assert taken.evict_idle()
    assert closed == ["idle"]
