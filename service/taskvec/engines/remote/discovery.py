"""Engine URLs, and discovery of the servers behind DNS names."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from urllib.parse import urlsplit

Resolve = Callable[[str], Awaitable[Sequence[str]]]
"""Resolves a host name to its addresses; raises OSError if this fails."""

_URL = re.compile(r"(?:https?://|unix:///)[^\s@]+")
_DNS = re.compile(r"dns://(?P<host>[^\s/:@]+):(?P<port>\d{1,5})")


def check_url(url: str) -> str:
    """Return the URL of a server without a trailing slash.

    Raises:
        ValueError: the URL is not ``http://``, ``https://``, ``unix:///path`` or
            ``dns://name:port``, or it contains a user name or password.
    """
    url = url.rstrip("/")
    if (_DNS if url.startswith("dns:") else _URL).fullmatch(url) and _has_address(url):
        return url
    if "@" in url:
        raise ValueError(
            "an engine URL must not contain a user name or password, because logs and metrics show "
            "it: set TASKVEC_ENGINE_API_KEY"
        )
    raise ValueError(
        f"{url!r} is not an engine URL: write http://host:port, https://host:port, "
        "unix:///path/to/socket, or dns://name:port for every address behind a name"
    )


def _has_address(url: str) -> bool:
    parts = urlsplit(url)
    try:
        return parts.scheme == "unix" or (bool(parts.hostname) and parts.port != 0)
    except ValueError:  # the port is not a number, or too large
        return False


async def resolve_host(host: str) -> Sequence[str]:
    """Return the addresses of a host name, from the resolver of the system.

    Raises:
        OSError: the name does not exist, or the resolver does not answer.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return sorted({str(address[0]) for *_, address in found})


async def expand(urls: Sequence[str], resolve: Resolve) -> tuple[list[str], list[str]]:
    """Replace ``dns://`` URLs by one URL per address.

    Returns:
        The URLs of the servers without duplicates, and a message for each failed lookup.
    """
    servers: list[str] = []
    failures: list[str] = []
    for url in urls:
        match = _DNS.fullmatch(url)
        if match is None:
            servers.append(url)
            continue
        try:
            addresses = await resolve(match["host"])
        except (OSError, UnicodeError) as error:
            failures.append(f"{url} could not be resolved ({error})")
            continue
        servers += [f"http://{_bracketed(address)}:{match['port']}" for address in addresses]
    return list(dict.fromkeys(servers)), failures


def _bracketed(address: str) -> str:
    version = ipaddress.ip_address(address.partition("%")[0]).version
    return address if version == 4 else f"[{address}]"
