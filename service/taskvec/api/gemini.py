"""Gemini's API: models/{model}:embedContent and :batchEmbedContents, with and without a version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from taskvec.api import fields, text_job
from taskvec.api.dialect import embedding_handler
from taskvec.api.endpoint import Handler, Route
from taskvec.api.errors import error_responses, error_with_body, message_with_delay
from taskvec.api.request import RequestLimits
from taskvec.api.response import DUMP_VALUES, VectorsByType
from taskvec.api.unsupported import unserved_schema
from taskvec.auth.keys import Key
from taskvec.core.job import EmbedJob, listed
from taskvec.core.output_format import OutputFormat, OutputType
from taskvec.core.tasks import Task
from taskvec.dialects import DialectName
from taskvec.errors import InvalidRequestError, TaskvecError
from taskvec.service import Service

PREFIXES = {"": "", "/v1": "_v1", "/v1beta": "_v1beta"}
"""Beginning of each path, and the end of its operation's name."""

TASK_TYPES = {
    "RETRIEVAL_QUERY": "retrieval.query",
    "RETRIEVAL_DOCUMENT": "retrieval.passage",
    "SEMANTIC_SIMILARITY": "text-matching",
    "CLASSIFICATION": "classification",
    "CLUSTERING": "clustering",
    "QUESTION_ANSWERING": "retrieval.query",
    "FACT_VERIFICATION": "retrieval.query",
    "CODE_RETRIEVAL_QUERY": "retrieval.query",
}
"""The API's task types; the documents that the last three find are RETRIEVAL_DOCUMENT."""

UNSPECIFIED = "TASK_TYPE_UNSPECIFIED"

TYPE_FIELDS = ("taskType", "task_type")
DIMENSION_FIELDS = ("outputDimensionality", "output_dimensionality")
AUTO_TRUNCATE = ("autoTruncate", "auto_truncate")
"""Each field in the two spellings that the API reads."""

UNSERVED = {
    **text_job.other_fields(
        ("content", *TYPE_FIELDS, *DIMENSION_FIELDS),
        texts="send a text in content, several by batchEmbedContents, and options beside content",
        task="name the task by taskType",
        dimensions="send the number of dimensions in outputDimensionality",
    ),
    "title": "put the title before the text",
}
"""Fields that would change vectors, and what to use instead."""

BESIDE_CONTENT = dict.fromkeys(
    (*TYPE_FIELDS, *DIMENSION_FIELDS, *AUTO_TRUNCATE), "send it beside content"
)
"""Fields that content cannot have."""

IN_REQUESTS = {
    **text_job.other_fields(
        ("requests",), texts="send the texts in requests", task="send it in requests"
    ),
    **dict.fromkeys((*DIMENSION_FIELDS, *AUTO_TRUNCATE), "send it in each of requests"),
    **dict.fromkeys(TYPE_FIELDS, "send it in each of requests"),
}
"""Fields that cannot stand beside requests."""

MEDIA = dict.fromkeys(
    ("inlineData", "inline_data", "fileData", "file_data"), "this model embeds text"
)

VALUES_OF_REQUEST = 24
"""JSON values of one text with all its fields."""

STATUS_NAMES = {
    401: "UNAUTHENTICATED",
    404: "NOT_FOUND",
    405: "UNIMPLEMENTED",
    408: "DEADLINE_EXCEEDED",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
"""Names of statuses in errors; the others are INVALID_ARGUMENT."""

_STRING, _NUMBER = {"type": "string"}, {"type": "integer"}

ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message", "status"],
            "properties": {"code": _NUMBER, "message": _STRING, "status": _STRING},
        }
    },
}


def error_response(error: TaskvecError, request_id: str) -> Response:  # noqa: ARG001 - as others
    """Render an error as Gemini does."""
    body = {
        "code": error.status,
        "message": message_with_delay(error),
        "status": STATUS_NAMES.get(error.status, "INVALID_ARGUMENT"),
    }
    return error_with_body(error, {"error": body})


class GeminiDialect:
    """Requests and responses of one model that the path names."""

    def __init__(self, service: Service, limits: RequestLimits, model: str, *, batch: bool) -> None:
        """Translate one request.

        Args:
            service: its model, names, tasks and limits decide what is valid.
            limits: limits of a request.
            model: name in the path.
            batch: several texts, under ``requests``.
        """
        self._embedder = service.embedder
        self._names = service.names
        self._limits = limits
        self._model = model
        self._batch = batch

    def read(
        self, body: Any, headers: Mapping[str, str], key: Key | None
    ) -> tuple[EmbedJob, OutputFormat]:
        """See ``Dialect.read``."""
        body = text_job.json_object(body)
        suffix = self._names.task_suffix(self._model)
        if self._batch:
            text_job.refuse_unserved(body, IN_REQUESTS)
            if body.get("requests") is None:
                raise text_job.missing("requests", "send a list of objects with content")
            items = text_job.list_of(body["requests"], "requests", self._limits.texts)
            places = [f"requests[{i}]." for i in range(len(items))]
            requests = [
                text_job.json_object(item, place[:-1])
                for item, place in zip(items, places, strict=True)
            ]
        else:
            requests, places = [body], [""]
        texts = [self._text(request, at) for request, at in zip(requests, places, strict=True)]
        truncate = _same(requests, places, AUTO_TRUNCATE, _auto_truncate)
        job = text_job.text_job(
            texts,
            [
                self._task(suffix, fields.agreed(request, TYPE_FIELDS, _task_type))
                for request in requests
            ],
            headers,
            key,
            self._limits,
            truncate=bool(truncate),
            text_name=listed("requests") if self._batch else text_job.alone("content"),
            truncation="autoTruncate: true, if your client can",
        )
        dimensions = _same(requests, places, DIMENSION_FIELDS, _dimensions)
        output = OutputFormat(
            self._embedder.model.dimension if dimensions is None else dimensions,
            dimensions_field=DIMENSION_FIELDS[0],
        )
        return job, output

    def render(self, vectors: VectorsByType, output: OutputFormat, tokens: int) -> Response:  # noqa: ARG002 - as others
        """See ``Dialect.render``; in pieces, as orjson holds the interpreter lock."""
        rows = vectors[OutputType.FLOAT]
        per_call = max(1, DUMP_VALUES // rows.shape[1])
        pieces = [
            orjson.dumps(
                [{"values": row} for row in rows[start : start + per_call]],
                option=orjson.OPT_SERIALIZE_NUMPY,
            )[1:-1]
            for start in range(0, len(rows), per_call)
        ]
        content = b",".join(pieces)
        form = b'{"embeddings":[%b]}' if self._batch else b'{"embedding":%b}'
        return Response(form % content, media_type="application/json")

    def _task(self, suffix: str | None, named: str | None) -> Task:
        task = TASK_TYPES.get(named) if named is not None else None
        return self._embedder.tasks.choose({"model": suffix, "taskType": task})

    def _text(self, request: Mapping[str, Any], at: str) -> str:
        """Return the text of one request, whose fields are at a place of the body."""
        text_job.refuse_unserved(request, UNSERVED, at)
        named = fields.string(request.get("model"), "model")
        if named is not None and named.removeprefix("models/") != self._model:
            raise InvalidRequestError(
                f"The path names the model {self._model[:200]!r}, {at}model names "
                f"{named[:200]!r}: name one.",
                code="conflicting_fields",
                param=f"{at}model",
            )
        if request.get("content") is None:
            raise text_job.missing(f"{at}content", "send an object with parts")
        content = text_job.json_object(request["content"], f"{at}content")
        text_job.refuse_unserved(content, BESIDE_CONTENT, f"{at}content.")
        parts = text_job.list_of(content.get("parts"), f"{at}content.parts", 1)
        part = text_job.json_object(parts[0], f"{at}content.parts[0]")
        text_job.refuse_unserved(part, MEDIA, f"{at}content.parts[0].")
        return text_job.text(part.get("text"), f"{at}content.parts[0].text")


def _same(
    requests: Sequence[Mapping[str, Any]], places: Sequence[str], names: Sequence[str], read: Any
) -> Any:
    """Return the value that a field has in all requests of a batch; None if it is in none."""
    value = fields.agreed(requests[0], names, read)
    for request, at in zip(requests[1:], places[1:], strict=True):
        if fields.agreed(request, names, read) != value:
            raise InvalidRequestError(
                f"{at}{names[0]} differs from that of requests[0]: send a batch for each.",
                code="conflicting_fields",
                param=f"{at}{names[0]}",
            )
    return value


def _task_type(value: Any, field: str) -> str:
    allowed = (*TASK_TYPES, UNSPECIFIED)
    return text_job.choice(value, field, allowed, code="unknown_task")


def _auto_truncate(value: Any, field: str) -> bool:
    if isinstance(value, bool):
        return value
    raise InvalidRequestError(
        f"{field} must be true or false, got {fields.type_name(value)}.",
        code="invalid_truncate",
        param=field,
    )


def _dimensions(value: Any, field: str) -> int:
    return fields.integer(value, field, code="invalid_dimensions")


def routes(service: Service, limits: RequestLimits) -> list[Route]:
    """Return the routes: two methods, with each version and without one."""
    limits = limits._replace(values=limits.values + VALUES_OF_REQUEST * limits.texts)
    return [
        _route(service, limits, prefix, batch=batch)
        for prefix in PREFIXES
        for batch in (True, False)
    ]


def _route(service: Service, limits: RequestLimits, prefix: str, *, batch: bool) -> Route:
    method = "batchEmbedContents" if batch else "embedContent"
    names, tasks = service.names.all, service.embedder.tasks.names
    models = [*names, *(f"{name}:{task}" for name in names for task in tasks)]
    parameters = [
        {"name": "model", "in": "path", "required": True, "schema": {"enum": models}},
    ]
    vector = {
        "type": "object",
        "required": ["values"],
        "properties": {"values": {"type": "array", "items": {"type": "number"}}},
    }
    many = {"embeddings": {"type": "array", "items": vector}}
    properties: dict[str, Any] = many if batch else {"embedding": vector}
    schema = {"type": "object", "required": list(properties), "properties": properties}
    return Route(
        method="POST",
        path=f"{prefix}/models/{{model:path}}:{method}",
        handler=_handler(service, limits, batch=batch),
        embeds=True,
        counted=True,
        dialect=DialectName.GEMINI,
        key_in_query=True,
        render_error=error_response,
        error_schema=ERROR_SCHEMA,
        summary=f"Embed {'texts' if batch else 'one text'}, as Gemini does",
        tags=("gemini",),
        responses={
            200: {
                "description": "Float vectors.",
                "content": {"application/json": {"schema": schema}},
            },
            **error_responses(400, 404, 408, 413, 415, 429, 500, 503, 504, schema=ERROR_SCHEMA),
        },
        openapi={
            "operationId": f"gemini_{method}{PREFIXES[prefix]}",
            "parameters": parameters,
            "requestBody": _request_schema(service, limits, batch=batch),
        },
    )


def _handler(service: Service, limits: RequestLimits, *, batch: bool) -> Handler:
    async def embed(request: Request) -> Response:
        dialect = GeminiDialect(service, limits, request.path_params["model"], batch=batch)
        handler = embedding_handler(dialect, service.embedder, limits, service.large_work)
        return await handler(request)

    return embed


def _request_schema(service: Service, limits: RequestLimits, *, batch: bool) -> dict[str, Any]:
    """Return the OpenAPI requestBody, as precise as the parser above."""
    embedder = service.embedder
    part = {
        "type": "object",
        "required": ["text"],
        "properties": {
            "text": {"type": "string", "minLength": 1},
            **unserved_schema(MEDIA),
        },
    }
    parts = {"type": "array", "items": part, "minItems": 1, "maxItems": 1}
    served = [name for name, task in TASK_TYPES.items() if task in embedder.tasks.names]
    task_type = {"enum": [*served, UNSPECIFIED, None]}
    dimensions = {
        "type": ["integer", "null"],
        "minimum": 1,
        "maximum": embedder.model.dimension,
    }
    flag = {"type": ["boolean", "null"]}
    request: dict[str, Any] = {
        "type": "object",
        "required": ["content"],
        "properties": {
            "content": {
                "type": "object",
                "required": ["parts"],
                "properties": {"parts": parts, **unserved_schema(BESIDE_CONTENT)},
            },
            **dict.fromkeys(TYPE_FIELDS, task_type),
            **dict.fromkeys(DIMENSION_FIELDS, dimensions),
            **dict.fromkeys(AUTO_TRUNCATE, flag),
            "model": {"type": ["string", "null"], "description": "The model of the path."},
            **unserved_schema(UNSERVED),
        },
    }
    example: dict[str, Any] = {
        "content": {"parts": [{"text": "How do I reset my password?"}]},
        "taskType": served[0] if served else None,
    }
    if batch:
        bounds = {"minItems": 1, "maxItems": limits.texts}
        requests = {"type": "array", "items": request, **bounds}
        request = {
            "type": "object",
            "required": ["requests"],
            "properties": {"requests": requests, **unserved_schema(IN_REQUESTS)},
        }
        example = {"requests": [example]}
    return {
        "required": True,
        "content": {"application/json": {"schema": request, "example": example}},
    }
