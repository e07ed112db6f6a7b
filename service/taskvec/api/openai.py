"""POST /v1/embeddings: OpenAI's API, with the fields that Jina and Voyage add."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from starlette.responses import Response

from taskvec.api import fields
from taskvec.api.dialect import embedding_handler
from taskvec.api.endpoint import Route
from taskvec.api.errors import error_responses
from taskvec.api.request import RequestLimits, prefers, request_priority, request_timeout
from taskvec.api.response import OCTET_STREAM, VectorsByType, openai_response
from taskvec.auth.keys import Key
from taskvec.checkpoint.backbone import ModelCard
from taskvec.core.embedder import AsyncEmbedder
from taskvec.core.job import EmbedJob
from taskvec.core.output_format import Encoding, OutputFormat, OutputType, single_type_format
from taskvec.core.tasks import ALIASES, INPUT_TYPES, ServedNames, Task
from taskvec.dialects import DialectName
from taskvec.engines.base import TokenIds
from taskvec.errors import InvalidRequestError
from taskvec.service import Service

PATH = "/v1/embeddings"

TYPE_FIELDS = ("embedding_type", "embedding_types", "encoding_type", "output_dtype")
"""Spellings of the output type: three of Jina's, then Voyage's."""

DIMENSION_FIELDS = ("dimensions", "output_dimension")
"""Spellings of the number of dimensions: OpenAI's and Jina's, then Voyage's."""

EMBEDDING_TYPES = ("float", "base64", *(kind.value for kind in OutputType if kind.value != "float"))
"""Values of the output type fields; base64 is float with the base64 encoding."""

TOKENS_REFUSED = (
    "This server takes text, not token ids: ids that another model's tokenizer made on the client "
    "give meaningless vectors. Send strings (langchain-openai: check_embedding_ctx_length=False), "
    "or let the operator set TASKVEC_TOKEN_INPUT=accept."
)


def routes(service: Service, limits: RequestLimits) -> list[Route]:
    """Return the route."""
    dialect = OpenAIDialect(service.embedder, service.names, limits)
    return [
        Route(
            method="POST",
            path=PATH,
            handler=embedding_handler(dialect, service.embedder, limits, service.large_work),
            embeds=True,
            counted=True,
            dialect=DialectName.OPENAI,
            summary="Embed texts for a task",
            tags=("embeddings",),
            responses={
                200: {
                    "description": "One vector per text, in order.",
                    "content": _response_schema(),
                },
                **error_responses(400, 404, 408, 413, 415, 429, 500, 503, 504),
            },
            openapi={
                "operationId": "create_embeddings",
                "requestBody": _request_schema(
                    service.engine.model, service.embedder.tasks, service.names, limits
                ),
            },
        )
    ]


class OpenAIDialect:
    """OpenAI's request and response, with Jina's and Voyage's additional fields."""

    def __init__(self, embedder: AsyncEmbedder, names: ServedNames, limits: RequestLimits) -> None:
        """Translate for one embedder.

        Args:
            embedder: its model, tasks and limits decide what is valid.
            names: names under which the model is served.
            limits: limits of a request.
        """
        self._embedder = embedder
        self._names = names
        self._limits = limits

    def read(
        self, body: Any, headers: Mapping[str, str], key: Key | None = None
    ) -> tuple[EmbedJob, OutputFormat]:
        """See ``Dialect.read``."""
        if not isinstance(body, dict):
            raise InvalidRequestError("The body must be a JSON object with the field input.")
        task = self._task(body)
        kind, encoding = _output(body, raw=prefers(headers, OCTET_STREAM, "application/json"))
        truncate = bool(fields.agreed(body, ("truncate", "truncation"), fields.boolean))
        normalized = fields.agreed(body, ("normalized",), fields.boolean)
        inputs = self._inputs(body.get("input"), truncate=truncate)
        dimensions, dimensions_field = fields.agreed_as(body, DIMENSION_FIELDS, _dimensions)
        job = EmbedJob(
            inputs=inputs,
            task=task,
            truncate=truncate,
            deadline=time.monotonic() + request_timeout(headers, self._limits.seconds),
            priority=request_priority(headers, key),
            tenant=key.name if key is not None else None,
        )
        output = single_type_format(
            self._embedder.model.dimension if dimensions is None else dimensions,
            kind,
            normalized is not False,
            encoding,
            dimensions_field,
        )
        return job, output

    def render(self, vectors: VectorsByType, output: OutputFormat, tokens: int) -> Response:
        """See ``Dialect.render``."""
        (matrix,) = vectors.values()
        return openai_response(matrix, tokens, output.encoding, self._names.primary)

    def _task(self, body: Mapping[str, Any]) -> Task:
        suffix = self._names.task_suffix(fields.string(body.get("model"), "model"))
        return self._embedder.tasks.choose(
            {
                "task": fields.string(body.get("task"), "task"),
                "task_type": fields.string(body.get("task_type"), "task_type"),
                "model": suffix,
                "input_type": fields.string(body.get("input_type"), "input_type"),
            }
        )

    def _inputs(self, value: Any, *, truncate: bool) -> Sequence[str] | Sequence[TokenIds]:
        if not isinstance(value, list):
            if value is None:
                raise InvalidRequestError(
                    "The field input is missing: send a string or a list of strings.",
                    code="missing_input",
                    param="input",
                )
            return [_text(value, "input")]
        if not value:
            raise InvalidRequestError(
                "input is an empty list: send at least one text.", code="empty_input", param="input"
            )
        if _is_number(value[0]) and value[0] % 1 == 0:
            return [self._token_ids(value, "input", truncate=truncate)]
        if len(value) > self._limits.texts:
            raise InvalidRequestError(
                f"input has {len(value)} items: at most {self._limits.texts} fit in one request.",
                code="too_many_inputs",
                param="input",
            )
        if isinstance(value[0], list) and value[0] and _is_number(value[0][0]):
            return [
                self._token_ids(ids, f"input[{i}]", truncate=truncate)
                for i, ids in enumerate(value)
            ]
        return [
            item if type(item) is str and item else _text(item, f"input[{i}]")
            for i, item in enumerate(value)
        ]

    def _token_ids(self, value: Any, where: str, *, truncate: bool) -> TokenIds:
        if not self._limits.token_ids:
            raise InvalidRequestError(TOKENS_REFUSED, code="token_input_rejected", param=where)
        if not isinstance(value, list) or not value:
            found = "an empty list" if value == [] else fields.type_name(value)
            raise InvalidRequestError(
                f"{where} must be a list of at least one token id, as the first item is, got "
                f"{found}.",
                code="invalid_input",
                param=where,
            )
        model = self._embedder.model
        if set(map(type, value)) != {int}:
            value = [_token_id(token, f"{where}[{i}]") for i, token in enumerate(value)]
        if min(value) < 0 or max(value) >= model.vocabulary:
            wrong = next(i for i, token in enumerate(value) if not 0 <= token < model.vocabulary)
            raise InvalidRequestError(
                f"{where}[{wrong}] is not a token id of this model: ids are whole numbers from 0 "
                f"to {model.vocabulary - 1}, got {value[wrong]}.",
                code="invalid_token_id",
                param=f"{where}[{wrong}]",
            )
        if len(value) > self._embedder.max_tokens:
            if not truncate:
                raise InvalidRequestError(
                    f"{where} has {len(value)} tokens: at most {self._embedder.max_tokens} fit.",
                    code="input_too_long",
                    param=where,
                )
            value = self._embedder.truncate(value)
        return np.array(value, dtype=np.int32)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)  # a boolean is an int to isinstance


def _token_id(value: Any, where: str) -> int:
    if _is_number(value):
        return fields.integer(value, where, code="invalid_token_id")
    raise InvalidRequestError(
        f"{where} must be a token id, as the first item of its list is, got "
        f"{fields.type_name(value)}: a list holds either texts or token ids.",
        code="invalid_token_id",
        param=where,
    )


def _text(value: Any, where: str) -> str:
    if isinstance(value, dict) and "text" in value:
        value, where = value["text"], f"{where}.text"
    if isinstance(value, list):
        raise InvalidRequestError(
            f'{where} must be a string or {{"text": string}}, got a list: send all texts in one '
            "list.",
            code="invalid_input",
            param=where,
        )
    if not isinstance(value, str):
        raise InvalidRequestError(
            f'{where} must be a string or {{"text": string}}, got {fields.type_name(value)}.',
            code="invalid_input",
            param=where,
        )
    if not value:
        raise InvalidRequestError(
            f"{where} is an empty string: there is nothing to embed.",
            code="empty_input",
            param=where,
        )
    return value


def _output(body: Mapping[str, Any], *, raw: bool) -> tuple[OutputType, Encoding]:
    """Return the number type and the encoding of the vectors."""
    encoding_format = fields.string(body.get("encoding_format"), "encoding_format")
    if encoding_format not in (None, "float", "base64"):
        raise InvalidRequestError(
            f"encoding_format must be float or base64, got {encoding_format[:80]!r}; other output "
            "types are chosen by embedding_type.",
            code="invalid_encoding_format",
            param="encoding_format",
        )
    requested, type_field = fields.agreed_as(body, TYPE_FIELDS, _output_type)
    base64 = encoding_format == "base64" or requested == "base64"
    kind = OutputType("float" if requested in (None, "base64") else requested)
    if raw:
        return kind, Encoding.RAW
    if kind is OutputType.FLOAT16:
        raise InvalidRequestError(
            f"float16 is only available as bytes: send the header Accept: {OCTET_STREAM}.",
            code="invalid_embedding_type",
            param=type_field,
        )
    if kind is not OutputType.FLOAT:
        # The OpenAI SDKs add base64 by themselves and would read packed bytes as floats: only
        # Voyage's own field asks for packed bytes in base64.
        voyage = all(body.get(name) is None for name in TYPE_FIELDS if name != "output_dtype")
        base64 = base64 and voyage
    return kind, Encoding.BASE64 if base64 else Encoding.NUMBERS


def _dimensions(value: Any, field: str) -> int:
    return fields.integer(value, field, code="invalid_dimensions")


def _output_type(value: Any, field: str) -> str:
    if isinstance(value, list):
        if len(value) != 1:
            raise InvalidRequestError(
                f"{field} must name one type: send one request for each.",
                code="invalid_embedding_type",
                param=field,
            )
        value = value[0]
    name = fields.string(value, field, code="invalid_embedding_type")
    if name not in EMBEDDING_TYPES:
        raise InvalidRequestError(
            f"{field} must be one of {', '.join(EMBEDDING_TYPES)}.",
            code="invalid_embedding_type",
            param=field,
        )
    return name


def _request_schema(
    card: ModelCard, tasks: Iterable[Task], names: ServedNames, limits: RequestLimits
) -> dict[str, Any]:
    """Return the OpenAPI requestBody, as precise as the parser above."""
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
    inputs = [item, {"type": "array", "items": item, "minItems": 1, "maxItems": limits.texts}]
    if limits.token_ids:
        ids = {
            "type": "array",
            "minItems": 1,
            "items": {"type": "integer", "minimum": 0, "maximum": card.vocabulary - 1},
        }
        inputs += [ids, {"type": "array", "items": ids, "minItems": 1, "maxItems": limits.texts}]
    dimensions = {
        "type": ["integer", "null"],
        "minimum": 1,
        "maximum": card.dimension,
        "description": "Number of leading values to keep; a multiple of 8 for the binary types.",
    }
    output_type = {
        "anyOf": [
            {"enum": [*EMBEDDING_TYPES, None]},
            {
                "type": "array",
                "items": {"enum": list(EMBEDDING_TYPES)},
                "minItems": 1,
                "maxItems": 1,
            },
        ],
        "description": f"Number type of the vectors; float16 only with Accept: {OCTET_STREAM}.",
    }
    flag = {"type": ["boolean", "null"]}
    task = {"enum": [*task_names, *aliases, None], "description": "Adapter and prompt to use."}
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
        **dict.fromkeys(TYPE_FIELDS, output_type),
        "normalized": {**flag, "description": "False returns the vectors without normalising."},
        "truncate": {
            **flag,
            "description": "True truncates texts that are too long; otherwise they are refused.",
        },
        "truncation": {**flag, "description": "The same as truncate."},
        "user": {"description": "Accepted and ignored, like every unknown field."},
    }
    schema = {"type": "object", "required": ["input"], "properties": properties}
    example = {"input": ["How do I reset my password?"], "task": task_names[0], "dimensions": 128}
    return {
        "required": True,
        "content": {"application/json": {"schema": schema, "example": example}},
    }


def _response_schema() -> dict[str, Any]:
    """Return the OpenAPI content of a 200."""
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
