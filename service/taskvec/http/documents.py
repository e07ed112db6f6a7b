"""/openapi.json, and /docs that shows it."""

from __future__ import annotations

from fastapi import APIRouter, FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import HTMLResponse, JSONResponse

from taskvec.http.access import with_header_scheme


def documents_router(app: FastAPI) -> APIRouter:
    """The two routes of an application that has none of its own."""
    router = APIRouter(include_in_schema=False)

    @router.get("/openapi.json")
    async def document() -> JSONResponse:
        if app.openapi_schema is None:
            app.openapi_schema = with_header_scheme(app.openapi())
        return JSONResponse(app.openapi_schema)

    @router.get("/docs")
    async def page() -> HTMLResponse:
        return get_swagger_ui_html(openapi_url="./openapi.json", title=app.title)

    return router
