"""A route whose endpoint takes the request as it is."""

from __future__ import annotations

from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.types import Receive, Scope, Send


class RawRoute(APIRoute):
    """Described like any route of FastAPI's, and called without its look for dependencies.

    That, and the context managers around it, would cost a tenth of the gateway's time for a text.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        """As ``APIRoute``; the endpoint is a coroutine function from Request to Response."""
        super().__init__(*args, **options)
        self.app = self._answer

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self.endpoint(Request(scope, receive, send))
        await response(scope, receive, send)
