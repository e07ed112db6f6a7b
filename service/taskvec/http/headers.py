"""A request's headers, for reading several of them."""

from __future__ import annotations

from starlette.types import Scope


def headers_of(scope: Scope) -> dict[str, str]:
    """The headers by their names in lower case; of one that was sent twice, the first."""
    sent = scope["headers"]
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(sent)}
