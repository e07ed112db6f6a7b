"""The API of text-embeddings-inference: /embed, / and /similarity, and /info."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from taskvec import __version__
from taskvec.api import fields, text_job
from taskvec.api.dialect import embedding_handler
from taskvec.api.endpoint import Route
from taskvec.api.errors import MAX_MESSAGE, error_responses, error_with_body, shortened
from taskvec.api.request import RequestLimits
from taskvec.api.response import VectorsByType, write_rows
from taskvec.api.unsupported import unserved_schema
from taskvec.auth.keys import Key
from taskvec.core.job import EmbedJob, TextName, listed
from taskvec.core.output_format import OutputFormat, OutputType
from taskvec.core.tasks import INPUT_TYPES, Task
from taskvec.dialects import DialectName
from taskvec.errors import InvalidRequestError, TaskvecError
from taskvec.service import Service

EMBED, ROOT, SIMILARITY, INFO = "/embed", "/", "/similarity", "/info"

DIRECTIONS = ("right", "left")

LEFT_REFUSED = "truncate: true with truncation_direction: right (left is not served)"

TASK_BY_PROMPT = {
    field: "name the task by prompt_name"
    for field in text_job.TASK_IN_MODEL
    if field != "prompt_name"
}

OPTIONS = ("prompt_name", "dimensions", "encoding_format", "normalize")

UNSERVED = text_job.other_fields(
    ("inputs", *OPTIONS),
    texts="send the texts in inputs",
    task="name the task by prompt_name",
    dimensions="send the number of dimensions in dimensions",
    normalized="send normalize",
)
"""Fields that would change vectors, and what to use instead."""

OUTSIDE_PARAMETERS = {
    **UNSERVED,
    **dict.fromkeys((*OPTIONS, "truncate", "truncation_direction"), "send it in parameters"),
}
"""The same of a body whose options are in an object of their own."""

ERROR_TYPES = ("Validation", "Empty", "Tokenizer", "Overloaded", "Unhealthy", "Backend")

ERROR_SCHEMA = {
    "type": "object",
    "required": ["error", "error_type"],
    "properties": {"error": {"type": "string"}, "error_type": {"enum": list(ERROR_TYPES)}},
}

ANY_OBJECT = {"application/json": {"schema": {"type": "object", "additionalProperties": True}}}


def error_response(error: TaskvecError, request_id: str) -> Response:  # noqa: ARG001 - as others
    """Render an error as text-embeddings-inference does."""
    message = shortened(error.message, MAX_MESSAGE)
    return error_with_body(error, {"error": message, "error_type": error_type(error)})


def error_type(error: TaskvecError) -> str:
    """Return the name of an error's kind; one of ``ERROR_TYPES``."""
    by_code = {"empty_input": "Empty", "untokenizable_input": "Tokenizer"}
    by_status = {429: "Overloaded", 503: "Unhealthy", 500: "Backend", 504: "Backend"}
    return by_code.get(error.code) or by_status.get(error.status, "Validation")


def truncation(options: Mapping[str, Any]) -> tuple[bool, str]:
    """Return whether long texts are cut, and what a client sends to have them cut."""
    truncate, value = options.get("truncate"), options.get("truncation_direction")
    left = value is not None and _direction(value) == "left"
    cut = truncate is not None and fields.boolean(truncate, "truncate")
    return cut and not left, LEFT_REFUSED if left else "truncate: true"


def _direction(value: Any) -> str:
    direction = fields.string(value, "truncation_direction", code="invalid_truncation")
    return text_job.choice(
        direction and direction.lower(),
        "truncation_direction",
        DIRECTIONS,
        code="invalid_truncation",
    )


class TeiDialect:
    """Requests and responses of /embed and /: a bare list of vectors."""

    def __init__(self, service: Service, limits: RequestLimits) -> None:
        """Translate for one service.

        Args:
            service: its model, names, tasks and limits decide what is valid.
            limits: limits of a request.
        """
        self.embedder = service.embedder
        self.names = service.names
        self.limits = limits

    def read(
        self, body: Any, headers: Mapping[str, str], key: Key | None = None
    ) -> tuple[EmbedJob, OutputFormat]:
        """See ``Dialect.read``."""
        body = text_job.json_object(body)
        inputs, text_name = self.inputs(body)
        options = self.options(body)
        text_job.refuse_unserved(options, UNSERVED)
        truncate, advice = truncation(options)
        job = text_job.text_job(
            inputs,
            self._task(options),
            headers,
            key,
            self.limits,
            truncate=truncate,
            text_name=text_name,
            truncation=advice,
        )
        return job, self._format(options)

    def render(self, vectors: VectorsByType, output: OutputFormat, tokens: int) -> Response:  # noqa: ARG002 - as others
        """See ``Dialect.render``."""
        parts: list[bytes] = []
        write_rows(vectors[OutputType.FLOAT], parts)
        return json_response(b"".join(parts), tokens)

    def inputs(self, body: Mapping[str, Any]) -> tuple[Sequence[str], TextName]:
        """Return the texts, and their names for errors."""
        value = body.get("inputs")
        if value is None:
            raise text_job.missing("inputs", "send a string or a list of strings")
        if isinstance(value, dict) and "source_sentence" in value:
            raise InvalidRequestError(
                f"inputs has source_sentence: send it to {SIMILARITY}.",
                code="invalid_input",
                param="inputs",
            )
        return text_job.text_or_texts(value, "inputs", self.limits.texts)

    def options(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the object that has the options: here the body itself."""
        parameters = body.get("parameters")
        if parameters is not None and parameters != {}:
            raise InvalidRequestError(
                "parameters is not served: send its fields beside inputs.",
                code="unsupported_field",
                param="parameters",
            )
        return body

    def _task(self, options: Mapping[str, Any]) -> Task:
        return self.embedder.tasks.choose(self.named_tasks(options))

    def named_tasks(self, options: Mapping[str, Any]) -> dict[str, str | None]:
        """Return the tasks that options name, by field."""
        prompt = fields.string(options.get("prompt_name"), "prompt_name", code="unknown_task")
        if prompt is not None:
            prompt = INPUT_TYPES.get(prompt, prompt)
        suffix = self.names.task_suffix(fields.string(options.get("model"), "model"))
        return {"model": suffix, "prompt_name": prompt}

    def _format(self, options: Mapping[str, Any]) -> OutputFormat:
        dimensions, normalize = options.get("dimensions"), options.get("normalize")
        if options.get("encoding_format") is not None:
            # The clients convert the answer to float32 without decoding it.
            text_job.choice(
                options["encoding_format"],
                "encoding_format",
                ("float",),
                code="invalid_encoding_format",
            )
        if dimensions is None:
            dimensions = self.embedder.model.dimension
        return OutputFormat(
            fields.integer(dimensions, "dimensions", code="invalid_dimensions"),
            normalized=normalize is None or fields.boolean(normalize, "normalize"),
        )


class TeiSimilarity(TeiDialect):
    """Requests and responses of /similarity: cosines of one text with others."""

    def render(self, vectors: VectorsByType, output: OutputFormat, tokens: int) -> Response:  # noqa: ARG002 - as others
        """See ``Dialect.render``."""
        rows = vectors[OutputType.FLOAT]
        return json_response(orjson.dumps((rows[1:] @ rows[0]).tolist()), tokens)

    def inputs(self, body: Mapping[str, Any]) -> tuple[Sequence[str], TextName]:
        """Return the texts, the source first, and their names for errors."""
        if body.get("inputs") is None:
            raise text_job.missing("inputs", "send an object with source_sentence and sentences")
        inputs = text_job.json_object(body["inputs"], "inputs")
        source = text_job.text(inputs.get("source_sentence"), "inputs.source_sentence")
        others = text_job.texts(
            inputs.get("sentences"), "inputs.sentences", max(1, self.limits.texts - 1)
        )
        return [source, *others], text_job.two_fields(
            text_job.alone("inputs.source_sentence"), listed("inputs.sentences")
        )

    def options(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the object that has the options."""
        text_job.refuse_unserved(body, OUTSIDE_PARAMETERS)
        parameters = body.get("parameters")
        return {} if parameters is None else text_job.json_object(parameters, "parameters")

    def _format(self, options: Mapping[str, Any]) -> OutputFormat:
        text_job.refuse_unserved(
            options, dict.fromkeys(("dimensions", "encoding_format"), "cosines have neither")
        )
        normalize = options.get("normalize")
        if normalize is not None and not fields.boolean(normalize, "normalize"):
            raise InvalidRequestError(
                "normalize: false is not served: the answer has cosines.",
                code="invalid_normalized",
                param="normalize",
            )
        return OutputFormat(self.embedder.model.dimension, writes_vectors=False)


def routes(service: Service, limits: RequestLimits) -> list[Route]:
    """Return the four routes."""
    dialect, similarity = TeiDialect(service, limits), TeiSimilarity(service, limits)
    return [
        _route(service, dialect, EMBED),
        _route(service, dialect, ROOT),
        _route(service, similarity, SIMILARITY),
        _info_route(service, limits),
    ]


def json_response(content: bytes, tokens: int) -> Response:
    """Return a response whose header has the usage, which the body cannot have."""
    headers = {"x-compute-tokens": str(tokens)}
    return Response(content, headers=headers, media_type="application/json")


def _route(service: Service, dialect: TeiDialect, path: str) -> Route:
    numbers: dict[str, Any] = {"type": "array", "items": {"type": "number"}}
    similarity = path == SIMILARITY
    schema = numbers if similarity else {"type": "array", "items": numbers}
    return Route(
        method="POST",
        path=path,
        handler=embedding_handler(dialect, service.embedder, dialect.limits, service.large_work),
        embeds=True,
        counted=True,
        dialect=DialectName.TEI,
        render_error=error_response,
        error_schema=ERROR_SCHEMA,
        summary="Compare one text with others, as text-embeddings-inference does"
        if similarity
        else "Embed texts, as text-embeddings-inference does",
        tags=("tei",),
        responses={
            200: {
                "description": "Cosines." if similarity else "One vector per text, in order.",
                "content": {"application/json": {"schema": schema}},
            },
            **error_responses(400, 404, 408, 413, 415, 429, 500, 503, 504, schema=ERROR_SCHEMA),
        },
        openapi={
            "operationId": f"tei_{path.strip('/') or 'root'}",
            "requestBody": _request_schema(dialect, similarity=similarity),
        },
    )


def _info_route(service: Service, limits: RequestLimits) -> Route:
    card = service.engine.model
    body = {
        "model_id": service.names.primary,
        "model_sha": card.revision,
        "model_type": {"embedding": {"pooling": "last_token"}},
        "max_input_length": service.embedder.max_tokens,
        "max_client_batch_size": limits.texts,
        "max_concurrent_requests": service.settings.max_queue_requests,
        "auto_truncate": False,
        "version": __version__,
    }

    async def info(_: Request) -> Response:
        batch_tokens = service.engine.batch_tokens  # 0 until the engine is ready
        known = {"max_batch_tokens": batch_tokens} if batch_tokens else {}
        return Response(orjson.dumps(body | known), media_type="application/json")

    return Route(
        path=INFO,
        handler=info,
        dialect=DialectName.TEI,
        render_error=error_response,
        error_schema=ERROR_SCHEMA,
        summary="The served model, as text-embeddings-inference describes it",
        tags=("tei",),
        responses={200: {"description": "Successful Response", "content": ANY_OBJECT}},
    )


def task_options(dialect: TeiDialect) -> dict[str, Any]:
    """Return the JSON schemas of the fields that name a task, and of those that cannot."""
    names, tasks = dialect.names, dialect.embedder.tasks.names
    prompts = [*tasks, *(name for name, task in INPUT_TYPES.items() if task in tasks)]
    models = [*names.all, *(f"{name}:{task}" for name in names.all for task in tasks)]
    return {
        "prompt_name": {
            "enum": list(dict.fromkeys([*prompts, None])),
            "description": "Names the task: query, document, or a task's own name.",
        },
        "model": {"enum": [*models, None], "description": "A served name, or name:task."},
        **unserved_schema(TASK_BY_PROMPT),
    }


def _request_schema(dialect: TeiDialect, *, similarity: bool) -> dict[str, Any]:
    """Return the OpenAPI requestBody, as precise as the parser above."""
    embedder = dialect.embedder
    text = {"type": "string", "minLength": 1}
    texts = {"type": "array", "items": text, "minItems": 1, "maxItems": dialect.limits.texts}
    flag = {"type": ["boolean", "null"]}
    options: dict[str, Any] = {
        "truncate": {**flag, "description": "True cuts texts that are too long."},
        "truncation_direction": {
            "enum": [*DIRECTIONS, "Right", "Left", None],
            "description": "left refuses texts that are too long.",
        },
        **task_options(dialect),
    }
    if similarity:
        sentences = {**texts, "maxItems": max(1, dialect.limits.texts - 1)}
        inputs: dict[str, Any] = {
            "type": "object",
            "required": ["source_sentence", "sentences"],
            "properties": {"source_sentence": text, "sentences": sentences},
        }
        options["normalize"] = {"enum": [True, None]}
        options["dimensions"] = options["encoding_format"] = {"enum": [None, False]}
        options = {**unserved_schema(UNSERVED), **options}
        parameters: dict[str, Any] = {"type": ["object", "null"], "properties": options}
        properties = {
            "inputs": inputs,
            "parameters": parameters,
            **unserved_schema(OUTSIDE_PARAMETERS),
        }
        example: dict[str, Any] = {"inputs": {"source_sentence": "a", "sentences": ["b", "c"]}}
    else:
        inputs = {"anyOf": [text, texts], "description": "What to embed."}
        options["normalize"] = {**flag, "description": "False returns vectors as they are."}
        options["dimensions"] = {
            "type": ["integer", "null"],
            "minimum": 1,
            "maximum": embedder.model.dimension,
            "description": "Number of leading values to keep.",
        }
        options["encoding_format"] = {"enum": ["float", None]}
        parameters = {"type": ["object", "null"], "maxProperties": 0}
        properties = {
            **unserved_schema(UNSERVED),
            "inputs": inputs,
            "parameters": parameters,
            **options,
        }
        example = {"inputs": ["How do I reset my password?"], "prompt_name": "query"}
    schema = {"type": "object", "required": ["inputs"], "properties": properties}
    return {
        "required": True,
        "content": {"application/json": {"schema": schema, "example": example}},
    }
