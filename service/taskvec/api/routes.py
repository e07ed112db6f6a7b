"""All routes of the service: a new route or dialect is a module with ``routes``, listed here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from fastapi import FastAPI

from taskvec.api import (
    cohere,
    engine_embed,
    gemini,
    health,
    models,
    ollama,
    openai,
    openai_paths,
    openapi,
    rerank,
    tei,
    tokenize,
    ui,
)
from taskvec.api.auth import ApiKeyAuth
from taskvec.api.endpoint import Route
from taskvec.api.errors import ErrorRenderer
from taskvec.api.request import RequestLimits
from taskvec.service import Service
from taskvec.settings import TokenInput

OTHER_VALUES = 1 << 14
"""JSON values that a body may have besides its texts or token ids: the parser holds the interpreter
lock for up to half a microsecond for each."""

VALUES_OF_TEXT = 4
"""JSON values of a text: it may be a value of an object, under a key, in a list."""


def all_routes(service: Service, app: FastAPI, auth: ApiKeyAuth | None) -> list[Route]:
    """Return every route, but for those of dialects that are not served.

    Args:
        service: what is served.
        app: describes the routes in its OpenAPI document.
        auth: None if the service has no API keys.
    """
    limits = _request_limits(service)
    routes = [
        *openai.routes(service, limits),
        *openai_paths.routes(service, limits),
        *cohere.routes(service, limits),
        *gemini.routes(service, limits),  # before models: a path begins with that of a model
        *ollama.routes(service, limits),
        *tei.routes(service, limits),
        *rerank.routes(service, limits),
        *tokenize.routes(service, limits),
        *engine_embed.routes(service, limits),
        *models.routes(service, token_ids=limits.token_ids),
        *health.routes(service, auth),
        *openapi.routes(app, auth),
        *(ui.routes() if service.settings.ui else ()),  # after tei, which has / as well
    ]
    served = service.settings.dialects
    return _with_other_methods(
        [route for route in routes if route.dialect is None or route.dialect in served]
    )


def forms_by_segment(routes: Iterable[Route]) -> dict[str, ErrorRenderer]:
    """Return the form of errors by a path's first segment, where all routes with it have one."""
    forms: dict[str, set[ErrorRenderer]] = {}
    for route in routes:
        forms.setdefault(route.path.split("/")[1], set()).add(route.render_error)
    return {segment: found.pop() for segment, found in forms.items() if len(found) == 1}


def _with_other_methods(routes: list[Route]) -> list[Route]:
    """Give each route the methods of the others that have its path."""
    methods: dict[str, list[str]] = {}
    for route in routes:
        methods.setdefault(route.path, []).extend(route.methods)
    return [
        replace(
            route,
            other_methods=tuple(m for m in methods[route.path] if m not in route.methods),
        )
        for route in routes
    ]


def _request_limits(service: Service) -> RequestLimits:
    settings = service.settings
    token_ids = settings.token_input is TokenInput.ACCEPT
    return RequestLimits(
        body_bytes=settings.max_body_bytes,
        body_seconds=settings.body_timeout,
        values=OTHER_VALUES + VALUES_OF_TEXT * settings.max_texts,
        ids=settings.max_texts * service.embedder.max_tokens if token_ids else 0,
        texts=settings.max_texts,
        seconds=settings.request_timeout,
        token_ids=token_ids,
    )
