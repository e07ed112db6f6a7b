"""GET /v1/models: the served model under each of its names, and each of its tasks."""

from __future__ import annotations

import time
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from taskvec.api.endpoint import Route
from taskvec.api.errors import error_responses
from taskvec.errors import NotFoundError
from taskvec.service import Service

MODEL_ID = {"name": "model_id", "in": "path", "required": True, "schema": {"type": "string"}}
"""OpenAPI description of the path parameter."""

ANY_OBJECT = {"application/json": {"schema": {"type": "object", "additionalProperties": True}}}


def routes(service: Service, *, token_ids: bool) -> list[Route]:
    """Return the two routes.

    Args:
        service: its model, names and tasks are listed.
        token_ids: whether requests may send token ids.
    """
    card, names = service.engine.model, service.names
    created = int(time.time())
    tasks = service.embedder.tasks.names

    def entry(model_id: str, task_names: list[str]) -> dict[str, Any]:
        return {
            "id": model_id,
            "object": "model",
            "created": created,
            "owned_by": names.primary.partition("/")[0],
            "dimensions": card.dimension,
            "matryoshka_dimensions": list(card.matryoshka),
            "max_tokens": service.embedder.max_tokens,
            "tasks": task_names,
            "token_input": token_ids,
            "revision": card.revision,
        }

    entries = {name: entry(name, tasks) for name in names.all}
    for name in names.all:
        for task in tasks:
            entries[f"{name}:{task}"] = entry(f"{name}:{task}", [task])

    async def list_models(_: Request) -> Response:
        body = {"object": "list", "data": list(entries.values())}
        return Response(orjson.dumps(body), media_type="application/json")

    async def get_model(request: Request) -> Response:
        model_id: str = request.path_params["model_id"]
        if model_id not in entries:
            raise NotFoundError(
                f"There is no model {model_id[:200]!r}: see /v1/models.",
                code="model_not_found",
                param="model",
            )
        return Response(orjson.dumps(entries[model_id]), media_type="application/json")

    success: dict[int | str, dict[str, Any]] = {
        200: {"description": "Successful Response", "content": ANY_OBJECT}
    }
    return [
        Route(
            path="/v1/models",
            handler=list_models,
            summary="List the served model, its aliases and its tasks",
            tags=("models",),
            responses=success,
        ),
        Route(
            path="/v1/models/{model_id:path}",
            handler=get_model,
            summary="One model, alias or name:task",
            tags=("models",),
            responses={**success, **error_responses(404)},
            openapi={"parameters": [MODEL_ID]},
        ),
    ]
