"""The sockets on which the server listens, and the proxies that it trusts."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from ipaddress import IPv4Network, ip_network

import structlog

from taskvec.errors import StartError

ALL_ADDRESSES = "::"
"""Host that means every address of the machine, of IPv6 and of IPv4."""

LOOPBACK = ("127.0.0.1", "::1")
"""Proxies that are trusted by default."""

PROXIES_VARIABLE = "FORWARDED_ALLOW_IPS"
"""uvicorn's own variable, read if the setting is empty."""

MAPPED_BITS = 96
"""Bits before the IPv4 address in ``::ffff:192.0.2.1``, the IPv6 form in which a socket of both
families shows it."""

_MISSING = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
"""Errors of an address that this machine does not have."""

log = structlog.get_logger(__name__)


def bind(host: str, port: int) -> list[socket.socket]:
    """Return bound sockets for every address of a host; they do not listen yet.

    ``::`` gives one socket for IPv6 and IPv4, if the kernel has both.

    Args:
        host: address or name.
        port: 0 for a free one.

    Raises:
        StartError: no address can be bound, or one is in use; names host and port.
    """
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    try:
        for family, address in _addresses(host, port):
            try:
                used = sockets[0].getsockname()[1] if sockets else port
                sockets.append(_bind(family, (address[0], used, *address[2:]), host))
            except OSError as error:
                if error.errno not in _MISSING:
                    raise
                missing = error
        if not sockets and missing is not None:
            raise missing
    except OSError as error:
        for each in sockets:
            each.close()
        raise StartError(_reason(host, port, error)) from None
    log.info("addresses_bound", addresses=[_shown(*each.getsockname()[:2]) for each in sockets])
    return sockets


def trusted_proxies(configured: tuple[str, ...]) -> list[str]:
    """Return the addresses and networks of proxies whose forwarded headers count, for uvicorn.

    Args:
        configured: by the settings; if empty, those in uvicorn's variable, or else this machine.
    """
    named = configured or tuple(
        filter(None, map(str.strip, os.environ.get(PROXIES_VARIABLE, "").split(",")))
    )
    if "*" in named:
        return ["*"]
    return [form for proxy in named or LOOPBACK for form in _forms(proxy)]


def _forms(proxy: str) -> Iterator[str]:
    """Yield a proxy's address, and the form that it has on a socket of both families."""
    yield proxy
    try:
        network = ip_network(proxy, strict=False)
    except ValueError:
        return
    if isinstance(network, IPv4Network):
        yield f"::ffff:{network.network_address}/{MAPPED_BITS + network.prefixlen}"


def _addresses(host: str, port: int) -> Iterator[tuple[socket.AddressFamily, tuple[object, ...]]]:
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    for family, _, _, _, address in dict.fromkeys(found):
        yield family, address


def _bind(family: socket.AddressFamily, address: tuple[object, ...], host: str) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family is socket.AF_INET6:
            # The system's default differs, and two sockets of one name would collide.
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, host != ALL_ADDRESSES)
        bound.bind(address)
        bound.setblocking(False)
    except BaseException:
        bound.close()
        raise
    return bound


def _reason(host: str, port: int, error: OSError) -> str:
    where = _shown(host, port)
    if isinstance(error, socket.gaierror):
        return f"{where} cannot be bound: the host {host!r} has no address ({error.strerror})."
    if error.errno == errno.EADDRINUSE:
        return f"{where} cannot be bound, because it is in use: is another server running?"
    if error.errno in _MISSING and host == ALL_ADDRESSES:
        return f"{where} cannot be bound: this machine has no IPv6; use the host 0.0.0.0."
    return f"{where} cannot be bound: {error.strerror}."


def _shown(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
