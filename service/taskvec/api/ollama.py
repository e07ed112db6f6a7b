"""Ollama's API: /api/embed, the older /api/embeddings, and what clients ask about models."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast

import orjson
from starlette.requests import Request
from starlette.responses import Response

from taskvec import __version__
from taskvec.api import fields, text_job
from taskvec.api.context import context_of
from taskvec.api.dialect import embedding_handler
from taskvec.api.endpoint import Route
from taskvec.api.errors import MAX_MESSAGE, error_responses, error_with_body, shortened
from taskvec.api.request import RequestLimits, header_dict, read_json
from taskvec.api.response import VectorsByType, write_rows
from taskvec.api.unsupported import unserved_schema
from taskvec.auth.keys import Key
from taskvec.checkpoint.backbone import ModelCard
from taskvec.core.job import EmbedJob, TextName
from taskvec.core.output_format import OutputFormat, OutputType
from taskvec.core.tasks import ServedNames, Task
from taskvec.dialects import DialectName
from taskvec.errors import InvalidRequestError, TaskvecError
from taskvec.service import Service

LATEST = ":latest"
"""Tag that clients add to a name without one."""

EMBED, EMBEDDINGS = "/api/embed", "/api/embeddings"

ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "string"}},
}

ANY_OBJECT = {"application/json": {"schema": {"type": "object", "additionalProperties": True}}}


def error_response(error: TaskvecError, request_id: str) -> Response:  # noqa: ARG001 - as others
    """Render an error as Ollama does: clients show the string."""
    return error_with_body(error, {"error": shortened(error.message, MAX_MESSAGE)})


@dataclass(frozen=True, slots=True)
class OllamaFormat(OutputFormat):
    """Output format of one answer.

    Attributes:
        model: name that the client sent.
        began: ``time.perf_counter_ns()`` when the body had been read.
    """

    model: str = ""
    began: int = 0


def _unserved(texts: str) -> dict[str, str]:
    """Return fields that would change vectors, and what to use instead."""
    return text_job.other_fields(
        (texts, "dimensions"),
        texts=f"send what to embed in {texts}",
        task="name the task after the model, as in model:task",
        dimensions="send the number of dimensions in dimensions",
    )


class OllamaDialect:
    """Requests and responses of /api/embed."""

    unserved = _unserved("input")

    def __init__(self, service: Service, limits: RequestLimits) -> None:
        """Translate for one service.

        Args:
            service: its model, names, tasks and limits decide what is valid.
            limits: limits of a request.
        """
        self.embedder = service.embedder
        self.names = service.names
        self._limits = limits

    def read(
        self, body: Any, headers: Mapping[str, str], key: Key | None = None
    ) -> tuple[EmbedJob, OutputFormat]:
        """See ``Dialect.read``."""
        began = time.perf_counter_ns()
        body = text_job.json_object(body)
        text_job.refuse_unserved(body, self.unserved)
        name, task = self._model(body)
        check_options(body.get("options"), self.embedder.max_tokens)
        truncate = body.get("truncate")
        inputs, text_name = self._inputs(body)
        job = text_job.text_job(
            inputs,
            task,
            headers,
            key,
            self._limits,
            truncate=truncate is None or fields.boolean(truncate, "truncate"),
            text_name=text_name,
            truncation="truncate: true",
        )
        dimensions = body.get("dimensions")
        if dimensions is None:
            dimensions = self.embedder.model.dimension
        else:
            dimensions = fields.integer(dimensions, "dimensions", code="invalid_dimensions")
        return job, OllamaFormat(dimensions, model=name, began=began)

    def render(self, vectors: VectorsByType, output: OutputFormat, tokens: int) -> Response:
        """See ``Dialect.render``."""
        output = cast("OllamaFormat", output)
        parts = [b'{"model":%b,"embeddings":' % orjson.dumps(output.model)]
        write_rows(vectors[OutputType.FLOAT], parts)
        took = time.perf_counter_ns() - output.began
        parts.append(
            b',"total_duration":%d,"load_duration":0,"prompt_eval_count":%d}' % (took, tokens)
        )
        return Response(b"".join(parts), media_type="application/json")

    def _model(self, body: Mapping[str, Any]) -> tuple[str, Task]:
        name = required_model(body, "model")
        return name, self.embedder.tasks.choose({"model": task_of(self.names, name)})

    def _inputs(self, body: Mapping[str, Any]) -> tuple[Sequence[str], TextName]:
        """Return the texts, and their names for errors."""
        value = body.get("input")
        if value is None:
            raise text_job.missing("input", "send a string or a list of strings")
        return text_job.text_or_texts(value, "input", self._limits.texts)


class OllamaPrompt(OllamaDialect):
    """Requests and responses of /api/embeddings: one text, one vector."""

    unserved = _unserved("prompt")

    def render(self, vectors: VectorsByType, output: OutputFormat, tokens: int) -> Response:  # noqa: ARG002 - as others
        """See ``Dialect.render``."""
        parts = [b'{"embedding":']
        write_rows(vectors[OutputType.FLOAT], parts)
        row = b"".join(parts[1:])[1:-1]
        return Response(b'{"embedding":%b}' % row, media_type="application/json")

    def _inputs(self, body: Mapping[str, Any]) -> tuple[Sequence[str], TextName]:
        """Return the text, and its name for errors."""
        if body.get("prompt") is None:
            raise text_job.missing("prompt", "send a string")
        return [text_job.text(body["prompt"], "prompt")], text_job.alone("prompt")


def task_of(names: ServedNames, model: str) -> str | None:
    """Return the task that a model's name ends with; the tag ``latest`` stands for none.

    Raises:
        NotFoundError: unknown model.
    """
    if model not in names.all:
        model = model.removesuffix(LATEST)
    return names.task_suffix(model)


def required_model(body: Mapping[str, Any], *spellings: str) -> str:
    """Return the name of the model, which these clients always send.

    Raises:
        InvalidRequestError: no name, or no string.
    """
    name = fields.agreed(body, spellings, _model_name)
    if not name:
        raise InvalidRequestError(
            "The field model is missing: send the name of the served model.",
            code="invalid_model",
            param="model",
        )
    return name


def _model_name(value: Any, field: str) -> str:
    return fields.string(value, field, code="invalid_model") or ""


def check_options(value: Any, max_tokens: int) -> None:
    """Check ``options``: of these, only the context length would change a vector.

    Raises:
        InvalidRequestError: no object, or a context length below the tokens that fit.
    """
    if value is None:
        return
    context = text_job.json_object(value, "options").get("num_ctx")
    if context is None:
        return
    field = "options.num_ctx"
    if fields.integer(context, field, code="unsupported_field") < max_tokens:
        raise InvalidRequestError(
            f"{field} below the {max_tokens} tokens that fit is not served: shorten the texts "
            "yourself.",
            code="unsupported_field",
            param=field,
        )


def routes(service: Service, limits: RequestLimits) -> list[Route]:
    """Return the five routes."""
    return [*_embedding_routes(service, limits), *_model_routes(service, limits)]


def _embedding_routes(service: Service, limits: RequestLimits) -> list[Route]:
    return [
        Route(
            method="POST",
            path=path,
            handler=embedding_handler(dialect, service.embedder, limits, service.large_work),
            embeds=True,
            counted=True,
            dialect=DialectName.OLLAMA,
            render_error=error_response,
            error_schema=ERROR_SCHEMA,
            summary=f"Embed {what}, as Ollama does",
            tags=("ollama",),
            responses={
                200: {
                    "description": "Float vectors.",
                    "content": {"application/json": {"schema": _response_schema(path)}},
                },
                **error_responses(400, 404, 408, 413, 415, 429, 500, 503, 504, schema=ERROR_SCHEMA),
            },
            openapi={
                "operationId": f"ollama_{path.rpartition('/')[2]}",
                "requestBody": _request_schema(dialect, limits, path),
            },
        )
        for path, dialect, what in (
            (EMBED, OllamaDialect(service, limits), "texts"),
            (EMBEDDINGS, OllamaPrompt(service, limits), "one text"),
        )
    ]


def _model_routes(service: Service, limits: RequestLimits) -> list[Route]:
    card, names = service.engine.model, service.names
    details = _details(card)
    since = datetime.now(UTC).isoformat()
    digest = hashlib.sha256(f"{card.name}@{card.revision}".encode()).hexdigest()
    tags = [
        *names.all,
        *(f"{name}:{t}" for name in names.all for t in service.embedder.tasks.names),
    ]
    models = [
        {
            "name": name,
            "model": name,
            "modified_at": since,
            "size": 4 * card.parameters,
            "digest": digest,
            "details": details,
        }
        for tag in tags
        for name in [tag if ":" in tag else f"{tag}{LATEST}"]
    ]
    family = card.architecture
    shown = {
        "modelfile": "",
        "parameters": "",
        "template": "{{ .Prompt }}",
        "details": details,
        "model_info": {
            "general.architecture": family,
            "general.parameter_count": card.parameters,
            f"{family}.context_length": service.embedder.max_tokens,
            f"{family}.embedding_length": card.dimension,
        },
        "capabilities": ["embedding"],
        "modified_at": since,
    }

    async def list_models(_: Request) -> Response:
        return Response(orjson.dumps({"models": models}), media_type="application/json")

    async def version(_: Request) -> Response:
        return Response(orjson.dumps({"version": __version__}), media_type="application/json")

    def check_model(body: Any) -> None:
        name = required_model(text_job.json_object(body), "model", "name")
        service.embedder.tasks.choose({"model": task_of(names, name)})

    async def show(request: Request) -> Response:
        context = context_of(request.scope)
        headers = header_dict(request.scope)
        await read_json(
            request.receive,
            headers,
            limits,
            context.memory,
            check_model,
            large_work=service.large_work,
        )
        return Response(orjson.dumps(shown), media_type="application/json")

    success: dict[int | str, dict[str, Any]] = {
        200: {"description": "Successful Response", "content": ANY_OBJECT}
    }
    model = {"type": "string", "minLength": 1, "enum": tags}
    body = {
        "type": "object",
        "required": ["model"],
        "properties": {"model": model, "name": {"type": "null"}},
    }
    return [
        Route(
            path="/api/tags",
            handler=list_models,
            dialect=DialectName.OLLAMA,
            render_error=error_response,
            error_schema=ERROR_SCHEMA,
            summary="List the served model, as Ollama does",
            tags=("ollama",),
            responses=success,
        ),
        Route(
            path="/api/version",
            handler=version,
            dialect=DialectName.OLLAMA,
            render_error=error_response,
            error_schema=ERROR_SCHEMA,
            summary="Version of this service",
            tags=("ollama",),
            responses=success,
        ),
        Route(
            method="POST",
            path="/api/show",
            handler=show,
            dialect=DialectName.OLLAMA,
            render_error=error_response,
            error_schema=ERROR_SCHEMA,
            summary="One model, as Ollama describes it",
            tags=("ollama",),
            responses={
                **success,
                **error_responses(400, 404, 408, 413, 415, 503, schema=ERROR_SCHEMA),
            },
            openapi={
                "operationId": "ollama_show",
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": body}},
                },
            },
        ),
    ]


def _details(card: ModelCard) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "safetensors",
        "family": card.architecture,
        "families": [card.architecture],
        "parameter_size": f"{card.parameters / 1e6:.1f}M",
        "quantization_level": "",
    }


def _request_schema(dialect: OllamaDialect, limits: RequestLimits, path: str) -> dict[str, Any]:
    """Return the OpenAPI requestBody, as precise as the parser above."""
    embedder, names = dialect.embedder, dialect.names
    text = {"type": "string", "minLength": 1}
    texts = {"type": "array", "items": text, "minItems": 1, "maxItems": limits.texts}
    most = embedder.max_tokens
    name = {
        "enum": [
            *names.all,
            *(f"{served}{LATEST}" for served in names.all),
            *(f"{served}:{task}" for served in names.all for task in embedder.tasks.names),
        ],
        "description": "A served name, which may have the tag latest, or name:task.",
    }
    properties: dict[str, Any] = {
        "model": name,
        "truncate": {
            "type": ["boolean", "null"],
            "description": "False refuses texts that are too long; otherwise they are cut.",
        },
        "dimensions": {
            "type": ["integer", "null"],
            "minimum": 1,
            "maximum": embedder.model.dimension,
            "description": "Number of leading values to keep.",
        },
        "options": {
            "type": ["object", "null"],
            "properties": {"num_ctx": {"type": ["integer", "null"], "minimum": most}},
            "description": f"Ignored, but for a num_ctx below {most}, which is refused.",
        },
        "keep_alive": {"description": "Ignored: the model stays loaded."},
        **unserved_schema(dialect.unserved),
    }
    if path == EMBED:
        properties["input"] = {"anyOf": [text, texts], "description": "What to embed."}
        required = ["model", "input"]
    else:
        properties["prompt"] = {**text, "description": "What to embed."}
        required = ["model", "prompt"]
    schema = {"type": "object", "required": required, "properties": properties}
    example = {"model": names.primary, required[1]: "How do I reset my password?"}
    return {
        "required": True,
        "content": {"application/json": {"schema": schema, "example": example}},
    }


def _response_schema(path: str) -> dict[str, Any]:
    """Return the JSON schema of a 200."""
    row = {"type": "array", "items": {"type": "number"}}
    if path == EMBEDDINGS:
        return {"type": "object", "required": ["embedding"], "properties": {"embedding": row}}
    number = {"type": "integer"}
    properties = {
        "model": {"type": "string"},
        "embeddings": {"type": "array", "items": row},
        "total_duration": {**number, "description": "Nanoseconds since the body was read."},
        "load_duration": number,
        "prompt_eval_count": {**number, "description": "Tokens embedded."},
    }
    return {"type": "object", "required": list(properties), "properties": properties}
