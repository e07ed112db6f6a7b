"""GET /openapi.json, and /docs: Swagger UI, whose files come from the package fastapi-swagger."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path

import orjson
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from taskvec.api.auth import ApiKeyAuth
from taskvec.api.endpoint import Handler, Route
from taskvec.api.static_files import content_security_policy, static_handler

FOLDER = Path(__file__).parents[1] / "ui" / "docs"

OURS = ("docs.css", "docs.js")

SWAGGER_UI = ("swagger-ui-bundle.js", "swagger-ui.css")

POLICY = content_security_policy(img_src="'self' data:")  # Swagger UI's icons are data URLs


def routes(app: FastAPI, auth: ApiKeyAuth | None) -> list[Route]:
    """Return the routes of the document, of the page that shows it, and of the page's files.

    The page and its files need no API key, which the page asks for; the document does.

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

    files = {name: static_handler(name, (FOLDER / name).read_bytes, POLICY) for name in OURS}
    files |= {name: static_handler(name, partial(_swagger_ui, name), POLICY) for name in SWAGGER_UI}
    return [
        Route(path="/openapi.json", handler=document, documented=False),
        Route(path="/docs", handler=_page(), public=True, documented=False),
        *(
            Route(path=f"/docs/files/{name}", handler=file, public=True, documented=False)
            for name, file in files.items()
        ),
    ]


def _page() -> Handler:
    """Return the handler of the page; its links are relative, as a proxy may have another path."""
    file = FOLDER / "docs.html"
    page = static_handler(file.name, file.read_bytes, POLICY)
    page_below = static_handler(
        file.name, lambda: file.read_bytes().replace(b'"./', b'"../'), POLICY
    )

    async def answer(request: Request) -> Response:
        below = request.scope.get("raw_path", b"").endswith(b"/")
        return await (page_below if below else page)(request)

    return answer


def _swagger_ui(name: str) -> bytes:
    """Read a file of Swagger UI; the package with it is found, not imported."""
    spec = find_spec("fastapi_swagger")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("fastapi-swagger is not installed: install taskvec again.")
    return (Path(spec.origin).parent / "resources" / name).read_bytes()
