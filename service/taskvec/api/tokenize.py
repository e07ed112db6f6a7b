"""POST /tokenize: the tokens of whole texts, as text-embeddings-inference lists them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import orjson
from starlette.requests import Request
from starlette.responses import Response

from taskvec.api import fields, tei, text_job
from taskvec.api.context import RequestContext, context_of
from taskvec.api.endpoint import Handler, Route
from taskvec.api.errors import error_responses
from taskvec.api.request import (
    RequestLimits,
    cancel_on_disconnect,
    header_dict,
    read_json,
    request_priority,
    request_timeout,
)
from taskvec.auth.keys import Key
from taskvec.core.job import TextName
from taskvec.core.tasks import Task
from taskvec.core.token_spans import TokenSpans
from taskvec.dialects import DialectName
from taskvec.errors import TaskvecError
from taskvec.priority import Priority
from taskvec.service import Service

PATH = "/tokenize"

TOKEN_BYTES = 160
"""About what a token takes in memory, and in the answer without its text."""

DUMP_TOKENS = 2048
"""Tokens written in one call, which holds the interpreter lock: less than a millisecond."""

INLINE_TOKENS = 1024
"""Most tokens of an answer that is written in the event loop."""

UNSERVED = {**tei.TASK_BY_PROMPT, "truncate": "every token is listed"}


class TokenizeRequest(NamedTuple):
    """What one request asks for.

    Attributes:
        texts: texts to tokenise.
        text_name: the client's names of the texts, for errors.
        task: whose prompt is put before each text; None for no prompt.
        special: list the tokenizer's special tokens as well.
        deadline: ``time.monotonic()`` after which the answer is no longer needed.
        priority: priority class.
    """

    texts: Sequence[str]
    text_name: TextName
    task: Task | None
    special: bool
    deadline: float
    priority: Priority


def routes(service: Service, limits: RequestLimits) -> list[Route]:
    """Return the route."""
    dialect = tei.TeiDialect(service, limits)
    return [
        Route(
            method="POST",
            path=PATH,
            handler=_handler(service, dialect),
            embeds=True,
            counted=True,
            dialect=DialectName.TEI,
            render_error=tei.error_response,
            error_schema=tei.ERROR_SCHEMA,
            summary="List the tokens of texts, as text-embeddings-inference does",
            tags=("tei",),
            responses={
                200: {
                    "description": "The tokens of each text, in order.",
                    "content": {"application/json": {"schema": _response_schema()}},
                },
                **error_responses(
                    400, 404, 408, 413, 415, 429, 500, 503, 504, schema=tei.ERROR_SCHEMA
                ),
            },
            openapi={"operationId": "tei_tokenize", "requestBody": _request_schema(dialect)},
        )
    ]


def _handler(service: Service, dialect: tei.TeiDialect) -> Handler:
    embedder, large_work = service.embedder, service.large_work

    async def tokenize(request: Request) -> Response:
        context = context_of(request.scope)
        headers = header_dict(request.scope)
        asked = await read_json(
            request.receive,
            headers,
            dialect.limits,
            context.memory,
            lambda body: _read(dialect, body, headers, context.key),
            large_work=large_work,
        )
        context.texts = len(asked.texts)
        context.task = None if asked.task is None else asked.task.name
        work = embedder.tokenize(
            asked.texts,
            "" if asked.task is None else asked.task.prompt,
            deadline=asked.deadline,
            priority=asked.priority,
            context=context,
        )
        try:
            found = await cancel_on_disconnect(request.receive, work)
        except TaskvecError as error:
            raise error.reworded(asked.text_name, "") from None
        tokens = sum(len(text.ids) for text in found)
        _hold(context, asked.texts, tokens)
        context.stages.start("encode")
        head, tail = embedder.special_tokens() if asked.special else ([], [])
        if tokens + len(found) <= INLINE_TOKENS:
            return _written(found, head, tail)
        return await large_work.run(tokens * TOKEN_BYTES, lambda: _written(found, head, tail))

    return tokenize


def _read(
    dialect: tei.TeiDialect, body: Any, headers: Mapping[str, str], key: Key | None
) -> TokenizeRequest:
    body = dialect.options(text_job.json_object(body))
    texts, text_name = dialect.inputs(body)
    text_job.refuse_unserved(body, UNSERVED)
    named = dialect.named_tasks(body)
    special = body.get("add_special_tokens")
    return TokenizeRequest(
        texts,
        text_name,
        None if set(named.values()) == {None} else dialect.embedder.tasks.choose(named),
        special is None or fields.boolean(special, "add_special_tokens", code="invalid_input"),
        time.monotonic() + request_timeout(headers, dialect.limits.seconds),
        request_priority(headers, key),
    )


def _hold(context: RequestContext, texts: Iterable[str], tokens: int) -> None:
    """Count the tokens and the answer, if the request is large enough to be counted."""
    if context.memory is not None:
        context.memory.resize(tokens * TOKEN_BYTES + 4 * sum(map(len, texts)))


def _written(
    found: Sequence[TokenSpans], head: list[tuple[int, str]], tail: list[tuple[int, str]]
) -> Response:
    """Return the answer; written in pieces, as orjson holds the interpreter lock."""
    before, after = _specials(head), _specials(tail)
    texts = [b"[%b]" % b",".join([*before, *_tokens(text), *after]) for text in found]
    return Response(b"[%b]" % b",".join(texts), media_type="application/json")


def _specials(tokens: list[tuple[int, str]]) -> list[bytes]:
    return [
        orjson.dumps({"id": id_, "text": name, "special": True, "start": None, "stop": None})
        for id_, name in tokens
    ]


def _tokens(found: TokenSpans) -> list[bytes]:
    """Return pieces of the list of a text's tokens."""
    pieces = []
    for first in range(0, len(found.ids), DUMP_TOKENS):
        piece = slice(first, first + DUMP_TOKENS)
        tokens = [
            {
                "id": id_,
                "text": found.text[start:stop],
                "special": False,
                "start": start,
                "stop": stop,
            }
            for id_, (start, stop) in zip(
                found.ids[piece].tolist(), found.spans[piece].tolist(), strict=True
            )
        ]
        pieces.append(orjson.dumps(tokens)[1:-1])
    return pieces


def _request_schema(dialect: tei.TeiDialect) -> dict[str, Any]:
    """Return the OpenAPI requestBody, as precise as the parser above."""
    text = {"type": "string", "minLength": 1}
    texts = {"type": "array", "items": text, "minItems": 1, "maxItems": dialect.limits.texts}
    options = tei.task_options(dialect)
    properties = {
        "inputs": {"anyOf": [text, texts], "description": "What to tokenise."},
        "add_special_tokens": {
            "type": ["boolean", "null"],
            "description": "False leaves out the tokenizer's special tokens.",
        },
        **options,
        "prompt_name": {
            **options["prompt_name"],
            "description": "The task whose prompt comes before each text; without it none does.",
        },
        "parameters": {"type": ["object", "null"], "maxProperties": 0},
        "truncate": {"enum": [None, False], "description": "Every token is listed."},
    }
    schema = {"type": "object", "required": ["inputs"], "properties": properties}
    example = {"inputs": ["How do I reset my password?"], "add_special_tokens": False}
    return {
        "required": True,
        "content": {"application/json": {"schema": schema, "example": example}},
    }


def _response_schema() -> dict[str, Any]:
    """Return the JSON schema of a 200."""
    place = {"type": ["integer", "null"], "description": "A character; null of special tokens."}
    properties = {
        "id": {"type": "integer"},
        "text": {"type": "string"},
        "special": {"type": "boolean"},
        "start": place,
        "stop": place,
    }
    token = {"type": "object", "required": list(properties), "properties": properties}
    return {"type": "array", "items": {"type": "array", "items": token}}
