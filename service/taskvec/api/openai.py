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
from taskvec.api.response import OCTET_STREAM, VectorsByType, openai_response, types_response
from taskvec.api.unsupported import (
    UNSUPPORTED,
    UNSUPPORTED_IN_ITEMS,
    refuse_unsupported,
    refuse_unsupported_in_item,
    unserved_schema,
)
from taskvec.auth.keys import Key
from taskvec.checkpoint.backbone import ModelCard
from taskvec.core.embedder import AsyncEmbedder
from taskvec.core.job import EmbedJob, listed
from taskvec.core.output_format import (
    BASE64_NAME,
    Encoding,
    OutputFormat,
    OutputType,
    single_type_format,
)
from taskvec.core.tasks import ALIASES, INPUT_TYPES, ServedNames, Task
from taskvec.dialects import DialectName
from taskvec.engines.base import TokenIds
from taskvec.errors import InvalidRequestError
from taskvec.service import Service

PATH = "/v1/embeddings"

INPUT_FIELDS = ("input", "texts", "content")
"""Spellings of the input: OpenAI's, Jina's and Voyage's, then Cohere's and Gemini's."""

TASK_FIELDS = ("task", "task_type", "input_type")
"""Fields that name a task, of a request or of an item of its input."""

TYPE_FIELDS = ("embedding_type", "embedding_types", "encoding_type", "output_dtype")
"""Spellings of the output type: three of Jina's, then Voyage's."""

VOYAGE_TYPE_FIELD = "output_dtype"
"""The spelling of Voyage's client, which reads base64 as the bytes of the type."""

DIMENSION_FIELDS = ("dimensions", "output_dimension", "output_dimensionality")
"""Spellings of the number of dimensions: OpenAI's and Jina's, Voyage's, Gemini's."""

NORMALIZED_FIELDS = ("normalized", "normalize")
"""Spellings of the scaling: Jina's, then that of text-embeddings-inference."""

TRUNCATE_FIELDS = ("truncate", "truncation")
"""Spellings of the truncation: Jina's, then Voyage's."""

EMBEDDING_TYPES = (
    "float",
    BASE64_NAME,
    *(kind.value for kind in OutputType if kind.value != "float"),
)
"""Values of the output type fields; base64 is float with the base64 encoding."""

REQUEST_FIELDS = dict.fromkeys(
    (
        "model",
        "encoding_format",
        *DIMENSION_FIELDS,
        *TYPE_FIELDS,
        *NORMALIZED_FIELDS,
        *TRUNCATE_FIELDS,
    ),
    "it holds for all texts, and stands beside input",
)
"""Fields that an item of the input cannot have, and why."""

OPENAI_SDK_HEADER = "x-stainless-lang"
"""Sent by OpenAI's SDKs, which decode every base64 as float32."""

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


Inputs = Sequence[str] | Sequence[TokenIds]


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
        refuse_unsupported(body)
        task = self._task(body)
        truncate, truncate_field = fields.agreed_as(body, TRUNCATE_FIELDS, fields.boolean)
        inputs, field, tasks = self._inputs(body, task, truncate=bool(truncate))
        if tasks is not None and len(set(tasks)) == 1:
            task, tasks = tasks[0], None
        job = EmbedJob(
            inputs=inputs,
            task=task,
            tasks=tasks,
            truncate=bool(truncate),
            deadline=time.monotonic() + request_timeout(headers, self._limits.seconds),
            priority=request_priority(headers, key),
            tenant=key.name if key is not None else None,
            text_name=listed(field),
            truncation=f"{truncate_field}: true",
        )
        return job, self._output(body, headers)

    def render(self, vectors: VectorsByType, output: OutputFormat, tokens: int) -> Response:
        """See ``Dialect.render``."""
        if output.names:
            return types_response(vectors, tokens, output, self._names.primary)
        (matrix,) = vectors.values()
        if output.as_float32:
            matrix = matrix.astype(np.float32)
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

    def _inputs(
        self, body: Mapping[str, Any], task: Task, *, truncate: bool
    ) -> tuple[Inputs, str, list[Task] | None]:
        """Return the inputs, the client's name for them, and their tasks if items name any."""
        sent = [field for field in INPUT_FIELDS if body.get(field) is not None]
        if not sent:
            raise InvalidRequestError(
                "The field input is missing: send a string or a list of strings.",
                code="missing_input",
                param="input",
            )
        inputs = self._read_inputs(body[sent[0]], sent[0], truncate=truncate)
        tasks = self._item_tasks(body[sent[0]], sent[0], task)
        for field in sent[1:]:
            others = self._read_inputs(body[field], field, truncate=truncate)
            if not _equal(inputs, others) or self._item_tasks(body[field], field, task) != tasks:
                raise InvalidRequestError(
                    f"{sent[0]} and {field} are two spellings of one field and disagree: send one.",
                    code="conflicting_fields",
                    param=field,
                )
        return inputs, sent[0], tasks

    def _read_inputs(self, value: Any, field: str, *, truncate: bool) -> Inputs:
        if not isinstance(value, list):
            return [_text(value, field)]
        if not value:
            raise InvalidRequestError(
                f"{field} is an empty list: send at least one text.",
                code="empty_input",
                param=field,
            )
        if _is_number(value[0]) and value[0] % 1 == 0:
            return [self._token_ids(value, field, truncate=truncate)]
        if len(value) > self._limits.texts:
            raise InvalidRequestError(
                f"{field} has {len(value)} items: at most {self._limits.texts} fit in one request.",
                code="too_many_inputs",
                param=field,
            )
        if isinstance(value[0], list) and value[0] and _is_number(value[0][0]):
            return [
                self._token_ids(ids, f"{field}[{i}]", truncate=truncate)
                for i, ids in enumerate(value)
            ]
        return [
            item if type(item) is str and item else _text(item, f"{field}[{i}]")
            for i, item in enumerate(value)
        ]

    def _item_tasks(self, value: Any, field: str, task: Task) -> list[Task] | None:
        """Return the task of each item; None if no item names another one than the request.

        Args:
            value: an input that ``_read_inputs`` has accepted.
            field: the client's name for it.
            task: of the items that name none.
        """
        if isinstance(value, dict):
            tasks = [self._item_task(value, field, task)]
        elif isinstance(value, list) and dict in set(map(type, value)):
            tasks = [
                self._item_task(item, f"{field}[{i}]", task) if isinstance(item, dict) else task
                for i, item in enumerate(value)
            ]
        else:
            return None
        return tasks if set(tasks) != {task} else None

    def _item_task(self, item: Mapping[str, Any], where: str, task: Task) -> Task:
        named = {
            field: fields.string(item[field], f"{where}.{field}", code=f"invalid_{field}")
            for field in TASK_FIELDS
            if item.get(field) is not None
        }
        return self._embedder.tasks.choose(named, f"{where}.") if named else task

    def _output(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> OutputFormat:
        """Return the form of the vectors."""
        encoding_format = _encoding_format(body)
        names, type_field = fields.agreed_as(body, TYPE_FIELDS, _output_types)
        normalized = fields.agreed(body, NORMALIZED_FIELDS, fields.boolean) is not False
        dimensions, dimensions_field = fields.agreed_as(body, DIMENSION_FIELDS, _dimensions)
        if dimensions is None:
            dimensions = self._embedder.model.dimension
        raw = prefers(headers, OCTET_STREAM, "application/json")
        if names is not None and len(names) > 1:
            _check_several(names, type_field, raw=raw)
            return OutputFormat(
                dimensions,
                tuple(dict.fromkeys(map(_number_type, names))),
                normalized,
                dimensions_field=dimensions_field,
                names=names,
            )
        name = names[0] if names else OutputType.FLOAT.value
        kind, encoding = _number_type(name), Encoding.NUMBERS
        as_float32 = False
        if raw:
            encoding = Encoding.RAW
        elif kind is OutputType.FLOAT16:
            raise _only_raw(type_field)
        elif BASE64_NAME in (encoding_format, name):
            encoding = Encoding.BASE64
            as_float32 = kind is not OutputType.FLOAT and not _decodes_bytes(body, headers)
        return single_type_format(
            dimensions, kind, normalized, encoding, dimensions_field, as_float32=as_float32
        )

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


def _equal(some: Iterable[Any], others: Iterable[Any]) -> bool:
    some, others = list(some), list(others)
    return len(some) == len(others) and all(
        type(one) is type(other) and np.array_equal(one, other)
        for one, other in zip(some, others, strict=True)
    )


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
    wanted = 'a string or {"text": string}'
    if isinstance(value, dict):
        refuse_unsupported_in_item(value, where, REQUEST_FIELDS)
        if "text" in value:
            value, where, wanted = value["text"], f"{where}.text", "a string"
    if isinstance(value, list):
        raise InvalidRequestError(
            f"{where} must be {wanted}, got a list: send all texts in one list.",
            code="invalid_input",
            param=where,
        )
    if not isinstance(value, str):
        raise InvalidRequestError(
            f"{where} must be {wanted}, got {fields.type_name(value)}.",
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


def _encoding_format(body: Mapping[str, Any]) -> str | None:
    encoding_format = fields.string(body.get("encoding_format"), "encoding_format")
    if encoding_format not in (None, "float", BASE64_NAME):
        raise InvalidRequestError(
            f"encoding_format must be float or base64, got {encoding_format[:80]!r}; other output "
            "types are chosen by embedding_type.",
            code="invalid_encoding_format",
            param="encoding_format",
        )
    return encoding_format


def _decodes_bytes(body: Mapping[str, Any], headers: Mapping[str, str]) -> bool:
    """Return whether a client reads the base64 of a quantised type as its bytes.

    Voyage's client does, and sends ``output_dtype``. OpenAI's SDKs, which ask for base64 by
    themselves, read every base64 as float32, whichever field names the type.
    """
    others = [name for name in TYPE_FIELDS if name != VOYAGE_TYPE_FIELD]
    return OPENAI_SDK_HEADER not in headers and all(body.get(name) is None for name in others)


def _number_type(name: str) -> OutputType:
    return OutputType.FLOAT if name == BASE64_NAME else OutputType(name)


def _check_several(names: Sequence[str], field: str, *, raw: bool) -> None:
    if raw:
        raise InvalidRequestError(
            f"{field} names {len(names)} types, but an answer of type {OCTET_STREAM} holds one: "
            "send one request for each, or accept JSON.",
            code="invalid_embedding_type",
            param=field,
        )
    if OutputType.FLOAT16.value in names:
        raise _only_raw(field)


def _only_raw(field: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"float16 is only available as bytes: send the header Accept: {OCTET_STREAM}.",
        code="invalid_embedding_type",
        param=field,
    )


def _dimensions(value: Any, field: str) -> int:
    return fields.integer(value, field, code="invalid_dimensions")


def _output_types(value: Any, field: str) -> tuple[str, ...]:
    """Return the types that a field names, each once, in the order of EMBEDDING_TYPES."""
    listed = value if isinstance(value, list) else [value]
    names = {fields.string(name, field, code="invalid_embedding_type") for name in listed}
    if not names or not names.issubset(EMBEDDING_TYPES):
        raise InvalidRequestError(
            f"{field} must be one of {', '.join(EMBEDDING_TYPES)}, or a list of these.",
            code="invalid_embedding_type",
            param=field,
        )
    return tuple(name for name in EMBEDDING_TYPES if name in names)


def _request_schema(
    card: ModelCard, tasks: Iterable[Task], names: ServedNames, limits: RequestLimits
) -> dict[str, Any]:
    """Return the OpenAPI requestBody, as precise as the parser above."""
    task_names = [task.name for task in tasks]
    aliases = [alias for alias, name in ALIASES.items() if name in task_names]
    input_types = [name for name, task in INPUT_TYPES.items() if task in task_names]
    task = {"enum": [*task_names, *aliases, None]}
    task_fields = {
        "task": {**task, "description": "Adapter and prompt to use."},
        "task_type": {**task, "description": "The same as task."},
        "input_type": {
            "enum": [*input_types, None],
            "description": "What Voyage and Cohere clients send instead of a task.",
        },
    }
    text = {"type": "string", "minLength": 1}
    entry = {
        "type": "object",
        "required": ["text"],
        "properties": {
            "text": text,
            **task_fields,
            **unserved_schema({**UNSUPPORTED, **UNSUPPORTED_IN_ITEMS, **REQUEST_FIELDS}),
        },
        "description": "A text, and its task if that is not the task of the request.",
    }
    item = {"anyOf": [text, entry]}
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
                "description": "With several, embedding is an object with a vector of each type.",
            },
        ],
        "description": f"Number type of the vectors; float16 only with Accept: {OCTET_STREAM}.",
    }
    also_dimensions = {**dimensions, "description": "The same as dimensions."}
    also_input = {"anyOf": [*inputs, {"type": "null"}], "description": "The same as input."}
    flag = {"type": ["boolean", "null"]}
    models = [*names.all, *(f"{name}:{task}" for name in names.all for task in task_names)]
    properties = {
        "model": {"enum": [*models, None], "description": "A served name, or name:task."},
        "input": {"anyOf": inputs, "description": "What to embed."},
        "texts": also_input,
        "content": also_input,
        **task_fields,
        "dimensions": dimensions,
        "output_dimension": also_dimensions,
        "output_dimensionality": also_dimensions,
        "encoding_format": {
            "enum": ["float", "base64", None],
            "description": (
                "Vectors as JSON numbers, or as base64 of little-endian float32; of the bytes of a "
                "quantised type only if output_dtype names it and no OpenAI SDK asks."
            ),
        },
        **dict.fromkeys(TYPE_FIELDS, output_type),
        "normalized": {**flag, "description": "False returns the vectors without normalising."},
        "normalize": {**flag, "description": "The same as normalized."},
        "truncate": {
            **flag,
            "description": "True truncates texts that are too long; otherwise they are refused.",
        },
        "truncation": {**flag, "description": "The same as truncate."},
        "user": {"description": "Accepted and ignored, like every unknown field."},
        **unserved_schema(UNSUPPORTED),
    }
    schema = {
        "type": "object",
        "properties": properties,
        "anyOf": [{"required": [field]} for field in INPUT_FIELDS],
    }
    example = {"input": ["How do I reset my password?"], "task": task_names[0], "dimensions": 128}
    return {
        "required": True,
        "content": {"application/json": {"schema": schema, "example": example}},
    }


def _response_schema() -> dict[str, Any]:
    """Return the OpenAPI content of a 200."""
    one = [
        {"type": "array", "items": {"type": "number"}},
        {"type": "string", "contentEncoding": "base64"},
    ]
    several = {
        "type": "object",
        "properties": {name: {"anyOf": one} for name in EMBEDDING_TYPES},
        "description": "The vector in each of several types.",
    }
    vector = {"anyOf": [*one, several]}
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
