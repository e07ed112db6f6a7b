"""POST /v1/rerank, /v2/rerank, /v1/score and /rerank: documents by their cosine with a query.

The score of a document is the cosine of two vectors of one model: the query's with its query task,
the document's with its passage task, embedded in one mixed batch. A cross-encoder, which reads both
texts together, ranks better and takes a forward pass for each pair; the answers say that this is
none.
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import orjson
from numpy.typing import NDArray
from starlette.responses import Response

from taskvec.api import cohere, fields, tei, text_job
from taskvec.api.dialect import embedding_handler
from taskvec.api.endpoint import Route
from taskvec.api.errors import ERROR_SCHEMA as OUR_ERROR_SCHEMA
from taskvec.api.errors import (
    ErrorRenderer,
    error_body,
    error_responses,
    error_with_body,
    message_with_delay,
)
from taskvec.api.openai import TRUNCATE_FIELDS
from taskvec.api.request import RequestLimits
from taskvec.api.response import VectorsByType
from taskvec.api.unsupported import unserved_schema
from taskvec.auth.keys import Key
from taskvec.core.embedder import AsyncEmbedder
from taskvec.core.job import EmbedJob, TextName, listed
from taskvec.core.output_format import OutputFormat, OutputType
from taskvec.core.tasks import QUERY, ServedNames
from taskvec.dialects import DialectName
from taskvec.errors import InvalidRequestError, TaskvecError
from taskvec.service import Service

V1, V2, TEI = "/v1/rerank", "/v2/rerank", "/rerank"
SCORE = ("/v1/score", "/score")

BI_ENCODER = "(bi-encoder)"
"""What follows the model's name in answers."""

WARNING = "relevance_score is the cosine of two embeddings, not the score of a cross-encoder"
"""Stands in the answers that have a place for it."""

DOCUMENTS_PER_SEARCH = 100
"""Documents of one search unit, in which Cohere counts."""

PAIRS = (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"))
"""Spellings of the two sides of /v1/score, all of them vLLM's."""

MAX_TOKENS = ("max_tokens_per_doc", "max_tokens_per_query")

_TEXT_ONLY = "this model ranks texts"
_ONE_VECTOR = "each text has one vector: split long documents yourself"
_TASKS = "a query and its documents have the two tasks of retrieval"
_PROMPTS = "write the words before the texts"
_WHOLE = "scores are cosines of whole vectors"
_CUT = "texts that are too long are cut at the end, at the model's limit"
_VECTORS = "ask for vectors by /v1/embeddings"

UNSERVED = {
    **dict.fromkeys(text_job.TASK_IN_MODEL, _TASKS),
    **dict.fromkeys(("prompt", "chat_template", "chat_template_kwargs"), _PROMPTS),
    **dict.fromkeys(("image", "images", "multi_modal"), _TEXT_ONLY),
    **dict.fromkeys(("max_chunks_per_doc", "late_interaction", "return_multivector"), _ONE_VECTOR),
    **dict.fromkeys(("relevant_spans", "return_relevant_spans"), "a document has one score"),
    **dict.fromkeys(("dimensions", "output_dimension", "embedding_type"), _WHOLE),
    "truncate_prompt_tokens": _CUT,
    "return_embeddings": _VECTORS,
    "top_k": "send the number of documents in top_n",
}
"""Fields that would change scores or the answer, and what to know or do instead."""

MEDIA = ("image", "images", "image_url", "audio", "audio_url", "video", "video_url", "multi_modal")
"""Fields of a document that is something else than a text, or more."""

MEDIA_WITHOUT_TEXT = (*MEDIA, "url", "bytes", "content")
"""Fields of a document without a text; beside one, they may be any other data."""

DUMP_CHARACTERS = 1 << 16
"""Characters of a document written in one call, which holds the interpreter lock."""

ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": [*OUR_ERROR_SCHEMA["required"], "id", "message"],
    "properties": {
        **OUR_ERROR_SCHEMA["properties"],
        "id": {"type": "string", "description": "The same as request_id."},
        "message": {"type": "string", "description": "The same, with the delay of a 429."},
    },
}


def error_response(error: TaskvecError, request_id: str) -> Response:
    """Render an error as Jina's and vLLM's clients read it, and as Cohere's do."""
    body = error_body(error, request_id)
    message = message_with_delay(error)
    return error_with_body(error, {**body, "id": request_id, "message": message})


@dataclass(frozen=True, slots=True)
class RankFormat(OutputFormat):
    """Form of one answer.

    Attributes:
        model: its name and the task, for the answer.
        queries: number of the texts that are queries, which come first.
        top: number of documents to return, the best ones; None for all.
        documents: what is returned of each document, as JSON; None for nothing.
    """

    model: str = ""
    queries: int = 1
    top: int | None = None
    documents: Sequence[bytes] | None = None
    writes_vectors: bool = False


def cosines(vectors: NDArray[np.float32], queries: int) -> NDArray[np.float32]:
    """Return the cosines of queries with documents.

    Args:
        vectors: float32 [queries + documents, dimension], each of length 1.
        queries: 1, or as many as documents.

    Returns:
        float32 [documents], each from -1 to 1.
    """
    left, right = vectors[:queries], vectors[queries:]
    found = right @ left[0] if queries == 1 else np.vecdot(left, right)
    bounded: NDArray[np.float32] = np.clip(found, -1.0, 1.0)
    return bounded


def most_pairs(texts: int) -> int:
    """Return how many pairs a request may have: a ranking has a query beside its texts."""
    return (texts + 1) // 2


def ranking(scores: NDArray[np.float32], top: int | None) -> NDArray[np.intp]:
    """Return the indices of the best scores, best first; of equal ones the first comes first."""
    return np.argsort(-scores, kind="stable")[:top]


class _Dialect(ABC):
    """What the routes share."""

    def __init__(self, service: Service, limits: RequestLimits) -> None:
        """Translate for one service.

        Args:
            service: its model, names, tasks and limits decide what is valid.
            limits: limits of a request.
        """
        self.embedder: AsyncEmbedder = service.embedder
        self.names: ServedNames = service.names
        self.limits = limits

    def read(
        self, body: Any, headers: Mapping[str, str], key: Key | None = None
    ) -> tuple[EmbedJob, OutputFormat]:
        """See ``Dialect.read``."""
        body = text_job.json_object(body)
        text_job.refuse_unserved(body, UNSERVED)
        for field in MAX_TOKENS:
            text_job.check_max_tokens(body, field, self.embedder.max_tokens)
        suffix = self.names.task_suffix(fields.string(body.get("model"), "model"))
        query, passage = self.embedder.tasks.sides(suffix)
        queries, documents, text_name, returned = self._texts(body)
        truncate, advice = self._truncation(body)
        job = text_job.text_job(
            [*queries, *documents],
            [*[query] * len(queries), *[passage] * len(documents)],
            headers,
            key,
            self.limits,
            truncate=truncate,
            text_name=text_name,
            truncation=advice,
        )
        output = RankFormat(
            self.embedder.model.dimension,
            model=f"{self.names.primary}:{query.name.removesuffix(QUERY)} {BI_ENCODER}",
            queries=len(queries),
            top=self._top(body),
            documents=returned,
            echo_bytes=sum(map(len, returned or ())),
        )
        return job, output

    @abstractmethod
    def _texts(
        self, body: Mapping[str, Any]
    ) -> tuple[list[str], list[str], TextName, Sequence[bytes] | None]:
        """Return queries, documents, their names, and the JSON that the answer repeats of each."""

    def _top(self, body: Mapping[str, Any]) -> int | None:
        """Return the number of documents that the answer has at most; None for all."""
        if body.get("top_n") is None:
            return None
        top = fields.integer(body["top_n"], "top_n", code="invalid_input")
        if top < 1:
            raise InvalidRequestError(
                f"top_n must be at least 1, got {top}.", code="invalid_input", param="top_n"
            )
        return top

    def _truncation(self, body: Mapping[str, Any]) -> tuple[bool, str]:
        """Return whether long texts are cut, and what a client sends to have them cut."""
        truncate, field = fields.agreed_as(body, TRUNCATE_FIELDS, fields.boolean)
        return truncate is None or truncate, f"{field}: true"


class RerankV1(_Dialect):
    """Requests and responses of /v1/rerank: Jina's, and those of Cohere's first version."""

    returns_documents = True

    def render(self, vectors: VectorsByType, output: OutputFormat, tokens: int) -> Response:
        """See ``Dialect.render``: an answer that clients of both APIs can read."""
        output = cast("RankFormat", output)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        head = {"id": str(uuid.uuid4()), "model": output.model, "object": "list", "usage": usage}
        results = _results(vectors, output, "relevance_score", "document")
        return _answer(head, results, {"meta": _meta(vectors, "1", tokens)})

    def _texts(
        self, body: Mapping[str, Any]
    ) -> tuple[list[str], list[str], TextName, Sequence[bytes] | None]:
        query = _document(_present(body, "query", "a string"), "query")
        listing = _present(body, "documents", "a list of strings")
        given = text_job.list_of(listing, "documents", self.limits.texts)
        documents = [_document(item, f"documents[{i}]") for i, item in enumerate(given)]
        if body.get("rank_fields") not in (None, ["text"]):
            raise InvalidRequestError(
                'rank_fields must be ["text"]: write other fields of a document into its text.',
                code="unsupported_field",
                param="rank_fields",
            )
        returned = body.get("return_documents")
        if returned is None:
            returned = self.returns_documents
        wanted = fields.boolean(returned, "return_documents", code="invalid_input")
        names = text_job.two_fields(text_job.alone("query"), listed("documents"))
        return [query], documents, names, _objects(given, "documents") if wanted else None


class RerankV2(RerankV1):
    """Requests and responses of /v2/rerank: Cohere's second version."""

    returns_documents = False

    def read(
        self, body: Any, headers: Mapping[str, str], key: Key | None = None
    ) -> tuple[EmbedJob, OutputFormat]:
        """See ``Dialect.read``."""
        cohere.check_priority(text_job.json_object(body))
        return super().read(body, headers, key)

    def render(self, vectors: VectorsByType, output: OutputFormat, tokens: int) -> Response:
        """See ``Dialect.render``."""
        output = cast("RankFormat", output)
        results = _results(vectors, output, "relevance_score", "document")
        return _answer({"id": str(uuid.uuid4())}, results, {"meta": _meta(vectors, "2", tokens)})

    def _truncation(self, body: Mapping[str, Any]) -> tuple[bool, str]:
        truncate = cohere.truncation(body)
        return truncate == "END", cohere.truncation_advice(truncate)


class Score(_Dialect):
    """Requests and responses of /v1/score: vLLM's, of one query or of pairs."""

    def render(self, vectors: VectorsByType, output: OutputFormat, tokens: int) -> Response:
        """See ``Dialect.render``; the scores stay in the order of the texts."""
        output = cast("RankFormat", output)
        scores = cosines(_floats(vectors), output.queries).tolist()
        body = {
            "id": f"score-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": output.model,
            "data": [
                {"index": i, "object": "score", "score": score} for i, score in enumerate(scores)
            ],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
        }
        return Response(orjson.dumps(body), media_type="application/json")

    def _texts(
        self, body: Mapping[str, Any]
    ) -> tuple[list[str], list[str], TextName, Sequence[bytes] | None]:
        sent = [pair for pair in PAIRS if all(body.get(field) is not None for field in pair)]
        if not sent:
            raise text_job.missing(
                "text_1" if body.get("text_1") is None else "text_2",
                f"send {', or '.join(' and '.join(pair) for pair in PAIRS)}",
            )
        (left, right), most = sent[0], self.limits.texts
        others = (field for pair in PAIRS for field in pair if field not in sent[0])
        more = next((field for field in others if body.get(field) is not None), None)
        if more is not None:
            raise InvalidRequestError(
                f"{left} and {right} are a way to send texts, {more} belongs to another: send one.",
                code="conflicting_fields",
                param=more,
            )
        queries, query_name = text_job.text_or_texts(body[left], left, most)
        documents, document_name = text_job.text_or_texts(body[right], right, most)
        if len(queries) not in (1, len(documents)):
            raise InvalidRequestError(
                f"{left} has {len(queries)} texts and {right} {len(documents)}: send one text in "
                f"{left}, or as many as in {right}.",
                code="conflicting_fields",
                param=left,
            )
        if len(queries) > most_pairs(most):
            raise InvalidRequestError(
                f"{left} and {right} have {2 * len(queries)} texts: at most {most_pairs(most)} "
                "pairs fit in one request.",
                code="too_many_inputs",
                param=left,
            )
        names = text_job.two_fields(query_name, document_name, len(queries))
        return queries, documents, names, None

    def _top(self, body: Mapping[str, Any]) -> int | None:  # noqa: ARG002 - has none
        return None

    def _truncation(self, body: Mapping[str, Any]) -> tuple[bool, str]:
        truncate, field = fields.agreed_as(body, TRUNCATE_FIELDS, fields.boolean)
        return bool(truncate), f"{field}: true"


class TeiRerank(_Dialect):
    """Requests and responses of /rerank: text-embeddings-inference's."""

    def render(self, vectors: VectorsByType, output: OutputFormat, tokens: int) -> Response:
        """See ``Dialect.render``."""
        results = _results(vectors, cast("RankFormat", output), "score", "text")
        return tei.json_response(b"".join((b"[", *results, b"]")), tokens)

    def _texts(
        self, body: Mapping[str, Any]
    ) -> tuple[list[str], list[str], TextName, Sequence[bytes] | None]:
        query = text_job.text(_present(body, "query", "a string"), "query")
        if body.get("texts") is None and body.get("documents") is not None:
            raise text_job.missing("texts", f"send it instead of documents, or ask {V1}")
        listing = _present(body, "texts", "a list of strings")
        texts = text_job.texts(listing, "texts", self.limits.texts)
        raw, wanted = body.get("raw_scores"), body.get("return_text")
        if raw is not None:
            fields.boolean(raw, "raw_scores", code="invalid_input")  # a cosine either way
        returned = wanted is not None and fields.boolean(
            wanted, "return_text", code="invalid_input"
        )
        names = text_job.two_fields(text_job.alone("query"), listed("texts"))
        return [query], texts, names, list(map(_string, texts)) if returned else None

    def _truncation(self, body: Mapping[str, Any]) -> tuple[bool, str]:
        return tei.truncation(body)


def _present(body: Mapping[str, Any], field: str, what: str) -> Any:
    if body.get(field) is None:
        raise text_job.missing(field, f"send {what}")
    return body[field]


def _document(value: Any, where: str) -> str:
    """Return the text of a string or of an object, whose other fields have no effect."""
    if not isinstance(value, dict):
        return text_job.text(value, where)
    refused = MEDIA_WITHOUT_TEXT if value.get("text") is None else MEDIA
    media = next((field for field in refused if value.get(field) is not None), None)
    if media is not None:
        raise InvalidRequestError(
            f"{where}.{media} is not served: {_TEXT_ONLY}.",
            code="unsupported_field",
            param=f"{where}.{media}",
        )
    return text_job.text(value.get("text"), f"{where}.text")


def _objects(documents: Sequence[Any], field: str) -> list[bytes]:
    """Return the JSON of each document in an answer, which is an object."""
    found = []
    for i, document in enumerate(documents):
        if isinstance(document, dict) and document.keys() == {"text"}:
            document = document["text"]  # noqa: PLW2901 - the same in the answer
        if isinstance(document, str):
            found.append(b"".join((b'{"text":', _string(document), b"}")))
            continue
        try:
            found.append(orjson.dumps(document))
        except TypeError:  # orjson reads 1,024 levels and writes 254
            raise InvalidRequestError(
                f"{field}[{i}] is nested too deeply to be returned: send return_documents: false, "
                "or its text alone.",
                code="invalid_input",
                param=f"{field}[{i}]",
            ) from None
    return found


def _string(text: str) -> bytes:
    """Return a JSON string; written in pieces, as orjson holds the interpreter lock."""
    if len(text) <= DUMP_CHARACTERS:
        return orjson.dumps(text)
    starts = range(0, len(text), DUMP_CHARACTERS)
    pieces = (orjson.dumps(text[i : i + DUMP_CHARACTERS])[1:-1] for i in starts)
    return b"".join((b'"', *pieces, b'"'))


def _floats(vectors: VectorsByType) -> NDArray[np.float32]:
    return cast("NDArray[np.float32]", vectors[OutputType.FLOAT])


def _results(vectors: VectorsByType, output: RankFormat, score: str, text: str) -> list[bytes]:
    """Return pieces of the entries of an answer, best first.

    Args:
        vectors: see ``Dialect.render``.
        output: of the answer.
        score: name of the score.
        text: name of the document.
    """
    scores = cosines(_floats(vectors), output.queries)
    name = b',"%b":' % text.encode()
    pieces: list[bytes] = []
    for i in ranking(scores, output.top).tolist():
        entry = orjson.dumps({"index": i, score: float(scores[i])})
        pieces += (b",", entry) if pieces else (entry,)
        if output.documents is not None:
            pieces[-1] = entry[:-1]
            pieces += (name, output.documents[i], b"}")
    return pieces


def _meta(vectors: VectorsByType, version: str, tokens: int) -> dict[str, Any]:
    documents = len(vectors[OutputType.FLOAT]) - 1
    return {
        "api_version": {"version": version},
        "billed_units": {"search_units": -(-documents // DOCUMENTS_PER_SEARCH)},
        "tokens": {"input_tokens": tokens},
        "warnings": [WARNING],
    }


def _answer(head: Mapping[str, Any], results: list[bytes], tail: Mapping[str, Any]) -> Response:
    """Return the JSON object with the members of ``head``, the results, and those of ``tail``.

    ``bytes.join`` copies the documents once, and gives up the interpreter lock for large ones.
    """
    start, end = orjson.dumps(head)[:-1], orjson.dumps(tail)[1:]
    content = b"".join((start, b',"results":[', *results, b"],", end))
    return Response(content, media_type="application/json")


def routes(service: Service, limits: RequestLimits) -> list[Route]:
    """Return the five routes, of three dialects."""
    return [
        _route(service, RerankV1(service, limits), V1, _OURS),
        _route(service, RerankV2(service, limits), V2, _COHERE),
        *(_route(service, Score(service, limits), path, _OURS) for path in SCORE),
        _route(service, TeiRerank(service, limits), TEI, _TEI),
    ]


class _Errors(NamedTuple):
    """A dialect, and the form of its errors."""

    dialect: DialectName
    render: ErrorRenderer
    schema: Mapping[str, Any]


_OURS = _Errors(DialectName.RERANK, error_response, ERROR_SCHEMA)
_COHERE = _Errors(DialectName.COHERE, cohere.error_response, cohere.ERROR_SCHEMA)
_TEI = _Errors(DialectName.TEI, tei.error_response, tei.ERROR_SCHEMA)


def _route(
    service: Service, dialect: RerankV1 | Score | TeiRerank, path: str, errors: _Errors
) -> Route:
    what = "Compare texts" if path in SCORE else "Rank documents"
    return Route(
        method="POST",
        path=path,
        handler=embedding_handler(dialect, service.embedder, dialect.limits, service.large_work),
        embeds=True,
        counted=True,
        dialect=errors.dialect,
        render_error=errors.render,
        error_schema=errors.schema,
        summary=f"{what} by the cosines of their vectors; this is not a cross-encoder",
        tags=(errors.dialect.value,),
        responses={
            200: {
                "description": "Scores in the order of the texts."
                if path in SCORE
                else "Documents by score, best first; of equal ones in the order of the request.",
                "content": {"application/json": {"schema": _response_schema(path)}},
            },
            **error_responses(400, 404, 408, 413, 415, 429, 500, 503, 504, schema=errors.schema),
        },
        openapi={
            "operationId": path.strip("/").replace("/", "_"),
            "requestBody": _request_schema(dialect, path),
        },
    )


def _request_schema(dialect: _Dialect, path: str) -> dict[str, Any]:
    """Return the OpenAPI requestBody, as precise as the parser above."""
    embedder, names, most = dialect.embedder, dialect.names, dialect.limits.texts
    models = [*names.all, *(f"{name}:{side}" for name in names.all for side in embedder.tasks.both)]
    text: dict[str, Any] = {"type": "string", "minLength": 1}
    flag = {"type": ["boolean", "null"]}
    at_least = {"type": ["integer", "null"], "minimum": embedder.max_tokens}
    properties: dict[str, Any] = {
        "model": {"enum": [*models, None], "description": "A served name, or name:retrieval."},
        **{key: {**at_least, "description": "At least what fits."} for key in MAX_TOKENS},
        **unserved_schema(UNSERVED),
    }
    top = {"type": ["integer", "null"], "minimum": 1, "description": "Of these at most."}
    cut = {**flag, "description": "Whether texts that are too long are cut, or else refused."}
    if path == TEI:
        texts = {"type": "array", "items": text, "minItems": 1, "maxItems": most}
        properties |= {
            "query": text,
            "texts": {**texts, "description": "What to rank."},
            "raw_scores": {**flag, "description": "Without effect: scores are cosines."},
            "return_text": flag,
            "top_n": top,
            "truncate": cut,
            "truncation_direction": {"enum": [*tei.DIRECTIONS, "Right", "Left", None]},
        }
        schema: dict[str, Any] = {"required": ["query", "texts"]}
        example: dict[str, Any] = {"query": "reset a password", "texts": ["Click on Forgot."]}
    elif path in SCORE:
        listing = {"type": "array", "items": text, "minItems": 1}
        left = {"anyOf": [text, {**listing, "maxItems": most_pairs(most)}]}
        right = {"anyOf": [text, {**listing, "maxItems": most}]}
        properties |= dict.fromkeys(TRUNCATE_FIELDS, cut)
        pairs = [
            {
                "required": list(pair),
                "properties": {
                    pair[0]: {**left, "description": "One text, or as many as on the right."},
                    pair[1]: right,
                    **{f: {"type": "null"} for other in PAIRS for f in other if f not in pair},
                },
            }
            for pair in PAIRS
        ]
        schema = {"oneOf": pairs}
        example = {"text_1": "reset a password", "text_2": ["Click on Forgot.", "Pay by card."]}
    else:
        refused = {f: {"type": "null", "description": "Not served."} for f in MEDIA}
        fields_of_entry = {"text": text, **refused}
        entry = {"type": "object", "required": ["text"], "properties": fields_of_entry}
        document = {"anyOf": [text, entry]}
        documents = {"type": "array", "items": document, "minItems": 1, "maxItems": most}
        properties |= {
            "query": document,
            "documents": {**documents, "description": "What to rank."},
            "top_n": top,
            "return_documents": flag,
            "rank_fields": {"enum": [["text"], None]},
        }
        if path == V2:
            properties["truncate"] = {"enum": [*cohere.TRUNCATE, None]}
            properties["priority"] = {
                "type": ["integer", "null"],
                "minimum": 0,
                "maximum": cohere.MAX_PRIORITY,
            }
        else:
            properties |= dict.fromkeys(TRUNCATE_FIELDS, cut)
        schema = {"required": ["query", "documents"]}
        example = {
            "query": "reset a password",
            "documents": ["Click on Forgot.", "Pay by card."],
            "top_n": 1,
        }
    schema |= {"type": "object", "properties": properties}
    return {
        "required": True,
        "content": {"application/json": {"schema": schema, "example": example}},
    }


def _response_schema(path: str) -> dict[str, Any]:
    """Return the JSON schema of a 200."""
    score = {"type": "number", "minimum": -1, "maximum": 1, "description": "A cosine."}
    index, text = {"type": "integer", "minimum": 0}, {"type": "string"}
    if path == TEI:
        entry = {"index": index, "text": text, "score": score}
        item = {"type": "object", "required": ["index", "score"], "properties": entry}
        return {"type": "array", "items": item}
    properties: dict[str, Any] = {"id": text}
    if path in SCORE:
        entry = {"index": index, "object": {"const": "score"}, "score": score}
        item = {"type": "object", "required": list(entry), "properties": entry}
        properties |= {"created": index, "data": {"type": "array", "items": item}}
    else:
        entry = {"index": index, "relevance_score": score, "document": {"type": "object"}}
        required = ["index", "relevance_score"]
        item = {"type": "object", "required": required, "properties": entry}
        properties |= {"results": {"type": "array", "items": item}, "meta": {"type": "object"}}
    if path != V2:
        model = {**text, "description": f"The served name, the task, and {BI_ENCODER}."}
        properties |= {"object": text, "model": model, "usage": {"type": "object"}}
    return {"type": "object", "required": list(properties), "properties": properties}
