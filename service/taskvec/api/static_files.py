"""Files of the package as responses: read when first requested, with an ETag and strict headers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from taskvec.api.endpoint import Handler

MEDIA_TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
"""Media type by the end of a file's name."""


def content_security_policy(**changed: str) -> str:
    """Return the policy of a page: scripts, styles, pictures and requests of this origin only.

    Args:
        changed: directives that replace or extend it, with ``_`` for ``-``.
    """
    directives = {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "'self'",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    directives |= {name.replace("_", "-"): value for name, value in changed.items()}
    return "; ".join(f"{name} {value}" for name, value in directives.items())


def static_handler(name: str, read: Callable[[], bytes], policy: str) -> Handler:
    """Return the handler of a file, which is read once, when it is first requested.

    Args:
        name: its end gives the media type.
        read: returns the content; runs in a thread.
        policy: value of Content-Security-Policy.
    """
    file: _File | None = None
    fixed = {
        "cache-control": "no-cache",  # asks each time, so an upgrade is seen
        "content-security-policy": policy,
        "cross-origin-resource-policy": "same-origin",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }
    media_type = MEDIA_TYPES[name.rpartition(".")[2]]

    async def answer(request: Request) -> Response:
        nonlocal file
        if file is None:
            file = await asyncio.to_thread(_File.read, read)
        headers = fixed | {"etag": file.etag}
        if _is_known(file.etag, request.headers):
            return Response(status_code=304, headers=headers)
        return Response(file.content, headers=headers | {"content-type": media_type})

    return answer


class _File(NamedTuple):
    content: bytes
    etag: str

    @classmethod
    def read(cls, read: Callable[[], bytes]) -> _File:
        content = read()
        return cls(content, f'"{sha256(content).hexdigest()[:32]}"')


def _is_known(etag: str, headers: Mapping[str, str]) -> bool:
    """Return whether a request's If-None-Match has the tag; proxies may have made it a weak one."""
    known = headers.get("if-none-match", "")
    return known.strip() == "*" or etag in {
        part.strip().removeprefix("W/") for part in known.split(",")
    }
