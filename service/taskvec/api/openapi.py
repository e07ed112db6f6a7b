"""The OpenAPI description of POST /v1/embeddings, as precise as its parser."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import HTMLResponse, JSONResponse

from taskvec.api.auth import with_header_scheme
from taskvec.api.response import OCTET_STREAM
from taskvec.checkpoint.backbone import ModelCard
from taskvec.core.tasks import ALIASES, INPUT_TYPES, ServedNames, Task

_JSON_TYPES = ["float", "base64", "int8", "uint8", "binary", "ubinary"]
_RAW_TYPES = [*_JSON_TYPES, "float16"]


def request_body(
    card: ModelCard, tasks: Iterable[Task], names: ServedNames, *, texts: int, token_ids: bool
) -> dict[str, Any]:
    """The requestBody object."""
    task_names = [task.name for task in tasks]
    aliases = [alias for alias, name in ALIASES.items() if name in task_names]
    input_types = [name for name, task in INPUT_TYPES.items() if task in task_names]
    text = {"type": "string", "minLength": 1}
    item = {
        "anyOf": [
            text,
            {"type": "object", "required": ["text"], "properties": {"text": text}},
        ]
    }
    inputs = [item, {"type": "array", "items": item, "minItems": 1, "maxItems": texts}]
    if token_ids:
        ids = {
            "type": "array",
            "minItems": 1,
            "items": {"type": "integer", "minimum": 0, "maximum": card.vocabulary - 1},
        }
        inputs += [ids, {"type": "array", "items": ids, "minItems": 1, "maxItems": texts}]
    dimensions = {
        "type": ["integer", "null"],
        "minimum": 1,
        "maximum": card.dimension,
        "description": "Keep the first so many values. Multiples of 8 for the binary types.",
    }
    one_type = {
        "anyOf": [
            {"enum": [*_RAW_TYPES, None]},
            {"type": "array", "items": {"enum": _RAW_TYPES}, "minItems": 1, "maxItems": 1},
        ],
        "description": f"Number type of the vectors; float16 only with Accept: {OCTET_STREAM}.",
    }
    flag = {"type": ["boolean", "null"]}
    task = {"enum": [*task_names, *aliases, None], "description": "The adapter and prompt."}
    models = [*names.all, *(f"{name}:{task}" for name in names.all for task in task_names)]
    properties = {
        "model": {"enum": [*models, None], "description": "A served name, or name:task."},
        "input": {"anyOf": inputs, "description": "What to embed."},
        "task": task,
        "task_type": {**task, "description": "The same as task."},
        "input_type": {
            "enum": [*input_types, None],
            "description": "What Voyage and Cohere clients send instead of a task.",
        },
        "dimensions": dimensions,
        "output_dimension": {**dimensions, "description": "The same as dimensions."},
        "encoding_format": {
            "enum": ["float", "base64", None],
            "description": "Float vectors as JSON numbers, or as base64 of little-endian float32.",
        },
        "embedding_type": one_type,
        "embedding_types": one_type,
        "encoding_type": one_type,
        "output_dtype": one_type,
        "normalized": {**flag, "description": "False leaves the vectors' lengths as they are."},
        "truncate": {**flag, "description": "True cuts what is too long; else it is refused."},
        "truncation": {**flag, "description": "The same as truncate."},
        "user": {"description": "Accepted and ignored, like every unknown field."},
    }
    schema = {"type": "object", "required": ["input"], "properties": properties}
    example = {"input": ["How do I reset my password?"], "task": task_names[0], "dimensions": 128}
    return {
        "required": True,
        "content": {"application/json": {"schema": schema, "example": example}},
    }


def response_content() -> dict[str, Any]:
    """The content of a 200."""
    vector = {
        "anyOf": [
            {"type": "array", "items": {"type": "number"}},
            {"type": "string", "contentEncoding": "base64"},
        ]
    }
    usage = {"prompt_tokens": {"type": "integer"}, "total_tokens": {"type": "integer"}}
    entry = {
        "type": "object",
        "required": ["object", "index", "embedding"],
        "properties": {
            "object": {"const": "embedding"},
            "index": {"type": "integer"},
            "embedding": vector,
        },
    }
    return {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["object", "model", "data", "usage"],
                "properties": {
                    "object": {"const": "list"},
                    "model": {"type": "string"},
                    "data": {"type": "array", "items": entry},
                    "usage": {"type": "object", "required": list(usage), "properties": usage},
                },
            }
        },
        OCTET_STREAM: {"schema": {"type": "string", "format": "binary"}},
    }


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
