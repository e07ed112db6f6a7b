"""POST /v1/embeddings: OpenAI, Jina and Voyage spellings on one route."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from taskvec.api.context import context_of
from taskvec.api.request import (
    RequestLimits,
    cancel_on_disconnect,
    header_dict,
    read_json,
    request_priority,
    request_timeout,
)
from taskvec.api.response import OCTET_STREAM, Transport, encode_off_loop
from taskvec.auth.keys import Key
from taskvec.core.embedder import AsyncEmbedder
from taskvec.core.job import EmbedJob, OutputType
from taskvec.core.tasks import ServedNames, Task
from taskvec.engines.base import TokenIds
from taskvec.errors import InvalidRequestError

TYPE_FIELDS = ("embedding_type", "embedding_types", "encoding_type", "output_dtype")
"""Spellings of the output type: Jina's three, then Voyage's."""

TOKENS_REFUSED = (
    "This server takes text, not token ids: ids that another model's tokenizer made on the client "
    "give meaningless vectors. Send strings (langchain-openai: check_embedding_ctx_length=False), "
    "or let the operator set TASKVEC_TOKEN_INPUT=accept."
)


class EmbeddingsRoute:
    """Translates a request into an EmbedJob, and the result into bytes."""

    def __init__(self, embedder: AsyncEmbedder, names: ServedNames, limits: RequestLimits) -> None:
        self._embedder = embedder
        self._names = names
        self._limits = limits

    async def __call__(self, request: Request) -> Response:
        """Answer one request; failures are raised as TaskvecError."""
        with self._embedder.work:
            return await self._answer(request)

    async def _answer(self, request: Request) -> Response:
        record = context_of(request.scope)
        headers = header_dict(request.scope)
        job, transport = await read_json(
            request.receive,
            headers,
            self._limits,
            lambda body: self.read(body, headers, record.key),
        )
        record.task, record.texts = job.task.name, len(job.inputs)
        record.output = job.output.value, transport.value
        result = await cancel_on_disconnect(
            request.receive, self._embedder.embed(job, record.stages, record.charge)
        )
        record.tokens = result.tokens
        return await encode_off_loop(result, transport, self._names.primary)

    def read(
        self, body: Any, headers: Mapping[str, str], key: Key | None = None
    ) -> tuple[EmbedJob, Transport]:
        """The job that a body asks for, and how its answer travels.

        Raises:
            InvalidRequestError: naming the field, or the item of ``input``, at fault.
            NotFoundError: unknown model.
        """
        if not isinstance(body, dict):
            raise InvalidRequestError("The body must be a JSON object with the field input.")
        task = self._task(body)
        raw = _wants_raw(headers)
        output, transport = _output(body, raw=raw)
        truncate = _agreed(body, ("truncate", "truncation"), _boolean)
        normalized = _agreed(body, ("normalized",), _boolean)
        job = EmbedJob(
            inputs=self._inputs(body.get("input"), truncate=bool(truncate)),
            task=task,
            dimensions=_agreed(body, ("dimensions", "output_dimension"), _integer),
            output=output,
            normalized=normalized is not False,
            truncate=bool(truncate),
            deadline=time.monotonic() + request_timeout(headers, self._limits.seconds),
            priority=request_priority(headers, key),
            owner=key.name if key is not None else None,
        )
        return job, transport

    def _task(self, body: Mapping[str, Any]) -> Task:
        suffix = self._names.task_suffix(_string(body.get("model"), "model"))
        return self._embedder.tasks.choose(
            {
                "task": _string(body.get("task"), "task"),
                "task_type": _string(body.get("task_type"), "task_type"),
                "model": suffix,
                "input_type": _string(body.get("input_type"), "input_type"),
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
            return [_item(value, "input")]
        if not value:
            raise InvalidRequestError(
                "input is an empty list: send at least one text.", code="empty_input", param="input"
            )
        if type(value[0]) is int:
            return [self._token_ids(value, "input", truncate=truncate)]
        if len(value) > self._limits.texts:
            raise InvalidRequestError(
                f"input has {len(value)} items: at most {self._limits.texts} fit in one request.",
                code="too_many_inputs",
                param="input",
            )
        if isinstance(value[0], list):
            return [
                self._token_ids(ids, f"input[{i}]", truncate=truncate)
                for i, ids in enumerate(value)
            ]
        return [
            item if type(item) is str and item else _item(item, f"input[{i}]")
            for i, item in enumerate(value)
        ]

    def _token_ids(self, value: Any, where: str, *, truncate: bool) -> TokenIds:
        if not self._limits.token_ids:
            raise InvalidRequestError(TOKENS_REFUSED, code="token_input_rejected", param=where)
        if not isinstance(value, list) or not value:
            raise InvalidRequestError(
                f"{where} must be a list of at least one token id, like its neighbours.",
                code="invalid_input",
                param=where,
            )
        model = self._embedder.model
        if set(map(type, value)) != {int} or min(value) < 0 or max(value) >= model.vocabulary:
            wrong = next(
                i
                for i, token in enumerate(value)
                if type(token) is not int or not 0 <= token < model.vocabulary
            )
            raise InvalidRequestError(
                f"{where}[{wrong}] is no token id of this model: ids are whole numbers from 0 to "
                f"{model.vocabulary - 1}.",
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
            value = self._embedder.cut(value)
        return np.array(value, dtype=np.int32)


def _item(value: Any, where: str) -> str:
    if isinstance(value, dict) and "text" in value:
        value, where = value["text"], f"{where}.text"
    if not isinstance(value, str):
        raise InvalidRequestError(
            f'{where} must be a string or {{"text": string}}, got {_kind(value)}.',
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


def _output(body: Mapping[str, Any], *, raw: bool) -> tuple[OutputType, Transport]:
    encoding = _string(body.get("encoding_format"), "encoding_format")
    if encoding not in (None, "float", "base64"):
        raise InvalidRequestError(
            f"encoding_format must be float or base64, got {encoding[:80]!r}; other output types "
            "are chosen by embedding_type.",
            code="invalid_encoding_format",
            param="encoding_format",
        )
    wanted = _agreed(body, TYPE_FIELDS, _output_type)
    base64 = encoding == "base64" or wanted == "base64"
    output = OutputType("float" if wanted in (None, "base64") else wanted)
    if raw:
        return output, Transport.RAW
    if output is OutputType.FLOAT16:
        raise InvalidRequestError(
            f"float16 travels only as bytes: send the header Accept: {OCTET_STREAM}.",
            code="invalid_embedding_type",
            param="embedding_type",
        )
    if output is not OutputType.FLOAT:
        # The OpenAI SDKs add base64 by themselves and would read packed bytes as floats: only
        # Voyage's own spelling asks for packed bytes in base64.
        voyage = all(body.get(field) is None for field in TYPE_FIELDS if field != "output_dtype")
        base64 = base64 and voyage
    return output, Transport.BASE64 if base64 else Transport.NUMBERS


def _output_type(value: Any, field: str) -> str:
    if isinstance(value, list):
        if len(value) != 1:
            raise InvalidRequestError(
                f"{field} must name one type: send one request for each.",
                code="invalid_embedding_type",
                param=field,
            )
        value = value[0]
    name = _string(value, field, code="invalid_embedding_type")
    known = ["float", "base64", *(kind.value for kind in OutputType if kind.value != "float")]
    if name not in known:
        raise InvalidRequestError(
            f"{field} must be one of {', '.join(known)}.",
            code="invalid_embedding_type",
            param=field,
        )
    return name


def _agreed(body: Mapping[str, Any], fields: Sequence[str], read: Any) -> Any:
    """The one value that all spellings of a field give; None where none is there."""
    value, by = None, ""
    for field in fields:
        if body.get(field) is None:
            continue
        other = read(body[field], field)
        if by and other != value:
            raise InvalidRequestError(
                f"{by} and {field} are two spellings of one field and disagree: send one.",
                code="conflicting_fields",
                param=field,
            )
        value, by = other, field
    return value


def _string(value: Any, field: str, *, code: str | None = None) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise InvalidRequestError(
        f"{field} must be a string, got {_kind(value)}.",
        code=code or f"invalid_{field}",
        param=field,
    )


def _integer(value: Any, field: str) -> int:
    if type(value) is int:
        return value
    raise InvalidRequestError(
        f"{field} must be a whole number, got {_kind(value)}.",
        code="invalid_dimensions",
        param=field,
    )


def _boolean(value: Any, field: str) -> bool:
    if isinstance(value, bool):
        return value
    raise InvalidRequestError(
        f"{field} must be true or false, got {_kind(value)}.", code=f"invalid_{field}", param=field
    )


def _kind(value: Any) -> str:
    kinds = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return kinds[type(value)]


def _wants_raw(headers: Mapping[str, str]) -> bool:
    accept = headers.get("accept")
    return accept is not None and OCTET_STREAM in (
        part.partition(";")[0].strip().lower() for part in accept.split(",")
    )
