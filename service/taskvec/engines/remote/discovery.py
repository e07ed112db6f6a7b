"""Which servers there are: listed, or found by DNS and looked up again and again."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from urllib.parse import urlsplit

Resolve = Callable[[str], Awaitable[Sequence[str]]]
"""A host name -> its addresses; raises OSError where there are none."""

_URL = re.compile(r"(?:https?://|unix:///)[^\s@]+")
_DNS = re.compile(r"dns://(?P<host>[^\s/:@]+):(?P<port>\d{1,5})")


def check_url(url: str) -> str:
    """A server's URL, without a trailing slash.

    Raises:
        ValueError: it is none of ``http://``, ``https://``, ``unix:///path`` or ``dns://name:port``,
            or holds a password.
    """
    url = url.rstrip("/")
    if (_DNS if url.startswith("dns:") else _URL).fullmatch(url) and _has_place(url):
        return url
    if "@" in url:
        raise ValueError(
            "an engine URL holds no name and password, which would stand in logs and metrics: set "
            "TASKVEC_ENGINE_API_KEY"
        )
    raise ValueError(
        f"{url!r} is no engine URL: write http://host:port, https://host:port, "
        "unix:///path/to/socket, or dns://name:port for every address behind a name"
    )


def _has_place(url: str) -> bool:
    parts = urlsplit(url)
    try:
        return parts.scheme == "unix" or (bool(parts.hostname) and parts.port != 0)
    except ValueError:  # the port is no number, or too large
        return False


async def resolve_host(host: str) -> Sequence[str]:
    """The addresses behind a name, from the system's resolver.

    Raises:
        OSError: there is no such name, or no resolver answers.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return sorted({str(address[0]) for *_, address in found})


async def expand(urls: Sequence[str], resolve: Resolve) -> tuple[list[str], list[str]]:
    """The servers behind some URLs.

    Returns:
        The servers' own URLs, and a sentence for each name that could not be resolved.
    """
    servers: list[str] = []
    failures: list[str] = []
    for url in urls:
        name = _DNS.fullmatch(url)
        if name is None:
            servers.append(url)
            continue
        try:
            found = await resolve(name["host"])
        except (OSError, UnicodeError) as error:
            failures.append(f"{url} could not be resolved ({error})")
            continue
        servers += [f"http://{_bracketed(address)}:{name['port']}" for address in found]
    return list(dict.fromkeys(servers)), failures


def _bracketed(address: str) -> str:
    version = ipaddress.ip_address(address.partition("%")[0]).version
    return address if version == 4 else f"[{address}]"
