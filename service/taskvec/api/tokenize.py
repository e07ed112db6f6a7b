"""POST /tokenize: the tokens of whole texts, as text-embeddings-inference lists them."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray
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

TOKEN_BYTES = 80
"""About what a token takes in the answer without its text."""

CHARACTER_BYTES = 4
"""Most bytes of a character in UTF-8."""

DUMP_BYTES = 1 << 17
"""Size of the tokens written in one call, which holds the interpreter lock: a millisecond."""

INLINE_BYTES = 100_000
"""Largest answer that is written in the event loop: 1,000 tokens of a few characters."""

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
        head, tail = embedder.special_tokens() if asked.special else ([], [])
        size = sum(map(_size, found)) + len(found) * (len(head) + len(tail)) * TOKEN_BYTES
        _hold(context, asked.texts, found, size)
        context.stages.start("encode")
        if size <= INLINE_BYTES:
            return _written(found, head, tail)
        return await large_work.run(size, lambda: _written(found, head, tail))

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


def _size(found: TokenSpans) -> int:
    """Return about how many bytes the tokens of a text take in the answer.

    A token may have many characters, and several tokens the same ones.
    """
    width = 1 if found.text.isascii() else CHARACTER_BYTES
    return len(found.ids) * TOKEN_BYTES + width * int(_lengths(found).sum())


def _lengths(found: TokenSpans) -> NDArray[np.int64]:
    """Return the number of characters of each token."""
    return found.spans[:, 1].astype(np.int64) - found.spans[:, 0]


def _hold(
    context: RequestContext, texts: Iterable[str], found: Iterable[TokenSpans], size: int
) -> None:
    """Count texts, with and without prompts, and the answer: its pieces are copied into one."""
    if context.memory is not None:
        held = sum(map(sys.getsizeof, texts)) + sum(sys.getsizeof(text.text) for text in found)
        context.memory.resize(held + 2 * size)


def _written(
    found: Sequence[TokenSpans], head: list[tuple[int, str]], tail: list[tuple[int, str]]
) -> Response:
    """Return the answer; written in pieces, as orjson holds the interpreter lock.

    ``bytes.join`` copies them once, and gives up the lock for large answers.
    """
    before, after = _specials(head), _specials(tail)
    pieces: list[bytes] = []
    for text in found:
        pieces.append(b",[" if pieces else b"[[")
        for i, tokens in enumerate(itertools.chain(before, _tokens(text), after)):
            pieces += (b",", tokens) if i else (tokens,)
        pieces.append(b"]")
    pieces.append(b"]")
    return Response(b"".join(pieces), media_type="application/json")


def _specials(tokens: list[tuple[int, str]]) -> list[bytes]:
    return [
        orjson.dumps({"id": id_, "text": name, "special": True, "start": None, "stop": None})
        for id_, name in tokens
    ]


def _tokens(found: TokenSpans) -> Iterator[bytes]:
    """Yield pieces of the list of a text's tokens: each of ``DUMP_BYTES``, and one token more."""
    sizes = np.cumsum(CHARACTER_BYTES * _lengths(found) + TOKEN_BYTES)
    start = 0
    while start < len(sizes):
        before = int(sizes[start - 1]) if start else 0
        stop = int(np.searchsorted(sizes, before + DUMP_BYTES)) + 1
        piece = slice(start, stop)
        start = stop
        tokens = [
            {
                "id": id_,
                "text": found.text[first:last],
                "special": False,
                "start": first,
                "stop": last,
            }
            for id_, (first, last) in zip(
                found.ids[piece].tolist(), found.spans[piece].tolist(), strict=True
            )
        ]
        yield orjson.dumps(tokens)[1:-1]


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
