"""GET /openapi.json and /docs."""

from __future__ import annotations

import orjson
from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.requests import Request
from starlette.responses import Response

from taskvec.api.auth import ApiKeyAuth
from taskvec.api.endpoint import Route


def routes(app: FastAPI, auth: ApiKeyAuth | None) -> list[Route]:
    """Return the two routes.

    Args:
        app: describes its other routes.
        auth: None if the service has no API keys.
    """

    async def document(_: Request) -> Response:
        if app.openapi_schema is None:
            schema = app.openapi()
            if auth is not None:
                schema.setdefault("components", {})["securitySchemes"] = auth.schemes
        return Response(orjson.dumps(app.openapi_schema), media_type="application/json")

    async def page(request: Request) -> Response:
        # Relative, because a proxy may serve this below a path of its own.
        below = request.scope.get("raw_path", b"").endswith(b"/")
        url = "../openapi.json" if below else "./openapi.json"
        return get_swagger_ui_html(openapi_url=url, title=app.title)

    return [
        Route(path="/openapi.json", handler=document, documented=False),
        Route(path="/docs", handler=page, documented=False),
    ]
