"""POST /v2/embed and POST /v1/embed: Cohere's API, several number types in one answer."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from starlette.responses import Response

from taskvec.api import fields, text_job
from taskvec.api.dialect import embedding_handler
from taskvec.api.endpoint import Route
from taskvec.api.errors import error_responses, error_with_body, message_with_delay
from taskvec.api.request import RequestLimits
from taskvec.api.response import VectorsByType, write_rows, write_rows_base64
from taskvec.api.unsupported import unserved_schema
from taskvec.auth.keys import Key
from taskvec.core.embedder import AsyncEmbedder
from taskvec.core.job import EmbedJob, TextName, listed
from taskvec.core.output_format import Encoding, OutputFormat, OutputType
from taskvec.core.tasks import INPUT_TYPES, ServedNames, Task
from taskvec.dialects import DialectName
from taskvec.errors import InvalidRequestError, TaskvecError
from taskvec.service import Service

INPUT_TYPE_NAMES = ("search_document", "search_query", "classification", "clustering")
"""Values of ``input_type``; ``image`` is refused by name."""

EMBEDDING_TYPES = ("float", "int8", "uint8", "binary", "ubinary", "base64")
"""Values of ``embedding_types``; base64 is float32 in little-endian order."""

TRUNCATE = ("NONE", "START", "END")
"""Values of ``truncate``; END is the API's default."""

ONLY_TEXT = "this model embeds text, so send texts, or inputs with content of the type text"

UNSERVED = text_job.other_fields(
    ("texts", "inputs", "input_type", "output_dimension", "embedding_types"),
    texts="send the texts in texts",
    task="name the task by input_type",
    dimensions="send the number of dimensions in output_dimension",
    types="name the types of the answer in embedding_types",
)
"""Fields that would change vectors, and what to use instead."""

START_REFUSED = "truncate: END (truncate: START is not served)"

MAX_PRIORITY = 999

ERROR_SCHEMA = {
    "type": "object",
    "required": ["id", "message"],
    "properties": {"id": {"type": "string"}, "message": {"type": "string"}},
}


def routes(service: Service, limits: RequestLimits) -> list[Route]:
    """Return the two routes."""
    return [
        _route(service, limits, version)
        for version in (CohereV2(service, limits), CohereV1(service, limits))
    ]


def error_response(error: TaskvecError, request_id: str) -> Response:
    """Render an error as Cohere does: the clients read ``message``."""
    body = {"id": request_id, "message": message_with_delay(error)}
    return error_with_body(error, body)


def truncation(body: Mapping[str, Any]) -> str:
    """Return the value of ``truncate``; one of ``TRUNCATE``."""
    if body.get("truncate") is None:
        return "END"
    return text_job.choice(body["truncate"], "truncate", TRUNCATE, code="invalid_truncate")


def truncation_advice(truncate: str) -> str:
    """Return what a client sends to have texts truncated, for errors."""
    return START_REFUSED if truncate == "START" else "truncate: END"


def check_priority(body: Mapping[str, Any]) -> None:
    """Check ``priority``, which has no effect.

    Raises:
        InvalidRequestError: not a number in its range.
    """
    if body.get("priority") is None:
        return
    priority = fields.integer(body["priority"], "priority")
    if not 0 <= priority <= MAX_PRIORITY:
        raise InvalidRequestError(
            f"priority must be between 0 and {MAX_PRIORITY}, got {priority}.",
            code="invalid_priority",
            param="priority",
        )


class CohereV2:
    """Requests and responses of the second version."""

    version = 2

    def __init__(self, service: Service, limits: RequestLimits) -> None:
        """Translate for one service.

        Args:
            service: its model, names, tasks and limits decide what is valid.
            limits: limits of a request.
        """
        self.embedder: AsyncEmbedder = service.embedder
        self.names: ServedNames = service.names
        self._limits = limits

    def read(
        self, body: Any, headers: Mapping[str, str], key: Key | None = None
    ) -> tuple[EmbedJob, OutputFormat]:
        """See ``Dialect.read``."""
        body = text_job.json_object(body)
        text_job.refuse_unserved(body, UNSERVED)
        truncate = truncation(body)
        self._check_ignored(body)
        inputs, text_name = self._inputs(body)
        job = text_job.text_job(
            inputs,
            self._task(body),
            headers,
            key,
            self._limits,
            truncate=truncate == "END",
            text_name=text_name,
            truncation=truncation_advice(truncate),
        )
        return job, self._format(body)

    def render(self, vectors: VectorsByType, output: OutputFormat, tokens: int) -> Response:
        """See ``Dialect.render``."""
        kind = "embeddings_by_type" if output.names else "embeddings_floats"
        parts = [
            b'{"id":"%b","response_type":"%b","embeddings":'
            % (str(uuid.uuid4()).encode(), kind.encode())
        ]
        if not output.names:
            write_rows(vectors[OutputType.FLOAT], parts)
        for i, name in enumerate(output.names):
            parts.append((b',"%b":' if i else b'{"%b":') % name.encode())
            if name == "base64":
                write_rows_base64(vectors[OutputType.FLOAT], parts)
            else:
                write_rows(vectors[OutputType(name)], parts)
        if output.names:
            parts.append(b"}")
        meta = {
            "api_version": {"version": str(self.version)},
            "billed_units": {"input_tokens": tokens},
        }
        parts.append(b',"meta":%b}' % orjson.dumps(meta))
        return Response(b"".join(parts), media_type="application/json")

    def _task(self, body: Mapping[str, Any]) -> Task:
        suffix = self.names.task_suffix(fields.string(body.get("model"), "model"))
        input_type = body.get("input_type")
        if input_type == "image":
            raise InvalidRequestError(
                f"input_type image is not served: {ONLY_TEXT}.",
                code="unsupported_field",
                param="input_type",
            )
        if input_type is not None:
            input_type = text_job.choice(
                input_type, "input_type", INPUT_TYPE_NAMES, code="unknown_task"
            )
        elif suffix is None and self._needs_input_type:
            raise InvalidRequestError(
                f"The field input_type is missing: send one of {', '.join(INPUT_TYPE_NAMES)}.",
                code="invalid_input_type",
                param="input_type",
            )
        return self.embedder.tasks.choose({"model": suffix, "input_type": input_type})

    _needs_input_type = True

    def _inputs(self, body: Mapping[str, Any]) -> tuple[Sequence[str], TextName]:
        """Return the texts, and their names for errors."""
        texts, inputs = body.get("texts"), body.get("inputs")
        if texts is not None and inputs is not None:
            raise InvalidRequestError(
                "texts and inputs are two ways to send texts: send one of them.",
                code="conflicting_fields",
                param="inputs",
            )
        if inputs is not None:
            items = text_job.list_of(inputs, "inputs", self._limits.texts)
            return [_content(item, f"inputs[{i}]") for i, item in enumerate(items)], listed(
                "inputs"
            )
        if texts is None:
            raise text_job.missing("texts", "send a list of strings")
        return text_job.texts(texts, "texts", self._limits.texts), listed("texts")

    def _check_ignored(self, body: Mapping[str, Any]) -> None:
        """Refuse values that would change an answer, of fields that change none here."""
        check_priority(body)
        text_job.check_max_tokens(body, "max_tokens", self.embedder.max_tokens)

    def _format(self, body: Mapping[str, Any]) -> OutputFormat:
        dimensions = self.embedder.model.dimension
        if body.get("output_dimension") is not None:
            dimensions = fields.integer(
                body["output_dimension"], "output_dimension", code="invalid_dimensions"
            )
        names = self._types(body.get("embedding_types"))
        kinds = dict.fromkeys(
            OutputType.FLOAT if name == "base64" else OutputType(name) for name in names
        )
        return OutputFormat(
            dimensions,
            tuple(kinds) or (OutputType.FLOAT,),
            encoding=Encoding.BASE64 if names == ("base64",) else Encoding.NUMBERS,
            dimensions_field="output_dimension",
            names=names,
        )

    def _types(self, value: Any) -> tuple[str, ...]:
        if value is None:
            return self._default_types
        if not isinstance(value, list) or not value:
            found = "an empty list" if value == [] else fields.type_name(value)
            raise InvalidRequestError(
                f"embedding_types must be a list of at least one type, got {found}.",
                code="invalid_embedding_type",
                param="embedding_types",
            )
        return tuple(
            dict.fromkeys(
                text_job.choice(
                    name, "embedding_types", EMBEDDING_TYPES, code="invalid_embedding_type"
                )
                for name in value
            )
        )

    _default_types: tuple[str, ...] = ("float",)


class CohereV1(CohereV2):
    """The first version: ``input_type`` is optional, and without types the vectors are a list."""

    version = 1
    _needs_input_type = False
    _default_types = ()


def _content(value: Any, where: str) -> str:
    """Return the text of one of ``inputs``."""
    content = text_job.list_of(
        text_job.json_object(value, where).get("content"), f"{where}.content", 1
    )
    part = text_job.json_object(content[0], f"{where}.content[0]")
    if part.get("type") != "text":
        raise InvalidRequestError(
            f"{where}.content[0].type must be text: {ONLY_TEXT}.",
            code="invalid_input",
            param=f"{where}.content[0].type",
        )
    return text_job.text(part.get("text"), f"{where}.content[0].text")


def _route(service: Service, limits: RequestLimits, dialect: CohereV2) -> Route:
    return Route(
        method="POST",
        path=f"/v{dialect.version}/embed",
        handler=embedding_handler(dialect, service.embedder, limits, service.large_work),
        embeds=True,
        counted=True,
        dialect=DialectName.COHERE,
        render_error=error_response,
        error_schema=ERROR_SCHEMA,
        summary=f"Embed texts, as Cohere's API version {dialect.version} does",
        tags=("cohere",),
        responses={
            200: {
                "description": "Vectors of each type, in the order of the texts.",
                "content": {"application/json": {"schema": _response_schema(dialect)}},
            },
            **error_responses(400, 404, 408, 413, 415, 429, 500, 503, 504, schema=ERROR_SCHEMA),
        },
        openapi={
            "operationId": f"cohere_embed_v{dialect.version}",
            "requestBody": _request_schema(dialect, limits),
        },
    )


def _request_schema(dialect: CohereV2, limits: RequestLimits) -> dict[str, Any]:
    """Return the OpenAPI requestBody, as precise as the parser above."""
    embedder, names = dialect.embedder, dialect.names
    task_names = [task.name for task in embedder.tasks]
    text = {"type": "string", "minLength": 1}
    part = {
        "type": "object",
        "required": ["type", "text"],
        "properties": {"type": {"const": "text"}, "text": text},
    }
    item = {
        "type": "object",
        "required": ["content"],
        "properties": {"content": {"type": "array", "items": part, "minItems": 1, "maxItems": 1}},
    }
    bounds = {"minItems": 1, "maxItems": limits.texts}
    texts = {"type": "array", "items": text, **bounds}
    inputs = {"type": "array", "items": item, **bounds}
    null = {"type": "null"}
    input_types = [name for name in INPUT_TYPE_NAMES if INPUT_TYPES[name] in task_names]
    models = [f"{name}:{task}" for name in names.all for task in task_names]
    optional = dialect.version == 1
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {
            "model": {"enum": [*names.all, *models, None], "description": "A served name."},
            "texts": {"description": "What to embed."},
            "inputs": {"description": "What to embed, as content of the type text."},
            "input_type": {"enum": [*input_types, None], "description": "Names the task."},
            "embedding_types": {
                "type": ["array", "null"],
                "items": {"enum": list(EMBEDDING_TYPES)},
                "minItems": 1,
                "description": "Number types of the answer; one forward pass serves all.",
            },
            "output_dimension": {
                "type": ["integer", "null"],
                "minimum": 1,
                "maximum": embedder.model.dimension,
                "description": "Number of leading values; a multiple of 8 for binary types.",
            },
            "truncate": {
                "enum": [*TRUNCATE, None],
                "description": "Of texts that are too long: END (the default) cuts, NONE refuses, "
                "as does START.",
            },
            "priority": {
                "type": ["integer", "null"],
                "minimum": 0,
                "maximum": MAX_PRIORITY,
                "description": "Ignored; the header x-priority has an effect.",
            },
            "max_tokens": {
                "type": ["integer", "null"],
                "minimum": embedder.max_tokens,
                "description": "At least what fits.",
            },
            **unserved_schema(UNSERVED),
        },
        "oneOf": [
            {"required": ["texts"], "properties": {"texts": texts, "inputs": null}},
            {"required": ["inputs"], "properties": {"texts": null, "inputs": inputs}},
        ],
    }
    if not optional:
        named = {"required": ["input_type"], "properties": {"input_type": {"enum": input_types}}}
        by_model = {"required": ["model"], "properties": {"model": {"enum": models}}}
        schema["anyOf"] = [named, by_model]
    example = {
        "texts": ["How do I reset my password?"],
        "input_type": "search_query",
        "embedding_types": ["float", "ubinary"],
    }
    return {
        "required": True,
        "content": {"application/json": {"schema": schema, "example": example}},
    }


def _response_schema(dialect: CohereV2) -> dict[str, Any]:
    """Return the JSON schema of a 200."""
    matrix = {"type": "array", "items": {"type": "array", "items": {"type": "number"}}}
    strings = {"type": "array", "items": {"type": "string", "contentEncoding": "base64"}}
    by_type: dict[str, Any] = {
        "type": "object",
        "properties": {name: strings if name == "base64" else matrix for name in EMBEDDING_TYPES},
        "additionalProperties": False,
    }
    plain = dialect.version == 1
    return {
        "type": "object",
        "required": ["id", "response_type", "embeddings", "meta"],
        "properties": {
            "id": {"type": "string"},
            "response_type": {"enum": ["embeddings_by_type", "embeddings_floats"]},
            "embeddings": {"anyOf": [by_type, matrix]} if plain else by_type,
            "meta": {"type": "object"},
        },
    }
