"""GET /v1/models: the served model under each of its names, and each task of it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, Request

from taskvec.api.errors import error_responses
from taskvec.checkpoint.backbone import ModelCard
from taskvec.core.tasks import ServedNames, Task
from taskvec.errors import NotFoundError

MODEL_ID = {"name": "model_id", "in": "path", "required": True, "schema": {"type": "string"}}
"""Described here: a parameter that FastAPI reads is documented with a 422 that never happens."""


def models_router(
    card: ModelCard,
    max_tokens: int,
    tasks: Iterable[Task],
    names: ServedNames,
    *,
    token_ids: bool,
) -> APIRouter:
    """The two routes."""
    created = int(time.time())
    all_tasks = [task.name for task in tasks]

    def entry(model_id: str, task_names: list[str]) -> dict[str, Any]:
        return {
            "id": model_id,
            "object": "model",
            "created": created,
            "owned_by": names.primary.partition("/")[0],
            "dimensions": card.dimension,
            "matryoshka_dimensions": list(card.matryoshka),
            "max_tokens": max_tokens,
            "tasks": task_names,
            "token_input": token_ids,
            "revision": card.revision,
        }

    entries = {name: entry(name, all_tasks) for name in names.all}
    for name in names.all:
        for task in all_tasks:
            entries[f"{name}:{task}"] = entry(f"{name}:{task}", [task])
    router = APIRouter(prefix="/v1/models", tags=["models"])

    @router.get("", summary="List the served model, its aliases and its tasks")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": list(entries.values())}

    @router.get(
        "/{model_id:path}",  # noqa: FAST003 - see MODEL_ID
        summary="One model, alias or name:task",
        responses=error_responses(404),
        openapi_extra={"parameters": [MODEL_ID]},
    )
    async def get_model(request: Request) -> dict[str, Any]:
        model_id: str = request.path_params["model_id"]
        if model_id not in entries:
            raise NotFoundError(
                f"There is no model {model_id[:200]!r}: see /v1/models.",
                code="model_not_found",
                param="model",
            )
        return entries[model_id]

    return router
