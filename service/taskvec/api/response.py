"""Responses: vectors of a finished job to bytes, without blocking the event loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import orjson
import pybase64
from numpy.typing import NDArray
from starlette.responses import Response

from taskvec.concurrency import LargeWork
from taskvec.core.job import Embeddings, JobContext
from taskvec.core.output_format import BASE64_NAME, Encoding, OutputFormat, OutputType

OCTET_STREAM = "application/octet-stream"

POSTPROCESS_INLINE_VALUES = 1 << 16
"""Largest number of values that is post-processed in the event loop: less than a millisecond."""

ENCODE_INLINE_BYTES = 1 << 18
"""Largest cost, in bytes of vectors, that is encoded in the event loop: one or two milliseconds."""

JSON_NUMBER_COST = 4
"""Cost of writing a byte of a vector as JSON numbers, relative to base64."""

DUMP_VALUES = 1 << 14
"""Values written as JSON in one call, which holds the interpreter lock: half a millisecond."""

VectorsByType = Mapping[OutputType, NDArray[np.generic]]
Render = Callable[[VectorsByType, int], Response]
"""Make the response of post-processed vectors and the number of tokens."""


def answer_bytes(texts: int, dimension: int, output: OutputFormat) -> int:
    """Estimate the memory of the vectors of a request and of its response.

    What the response repeats of the request exists twice: by itself, and in the response.

    Args:
        texts: number of texts.
        dimension: the engine's, whose vectors are float32.
        output: the form in which they are returned.
    """
    written = output.bytes * (JSON_NUMBER_COST if output.encoding is Encoding.NUMBERS else 1)
    return texts * (4 * dimension + written) + 2 * output.echo_bytes


async def respond(
    result: Embeddings,
    output: OutputFormat,
    render: Render,
    context: JobContext,
    large_work: LargeWork,
) -> Response:
    """Post-process and encode vectors; in a thread if that would block the event loop.

    Args:
        result: float32 vectors of a finished job.
        output: the form in which they are returned.
        render: writes the response body of the dialect.
        context: its stage ``encode`` begins.
        large_work: runs what would block the event loop.
    """
    context.stages.start("encode")
    rows = len(result.vectors)
    cost = rows * output.bytes * (JSON_NUMBER_COST if output.encoding is Encoding.NUMBERS else 1)
    cost += output.echo_bytes
    if rows * output.dimensions <= POSTPROCESS_INLINE_VALUES and cost <= ENCODE_INLINE_BYTES:
        return render(output.apply(result.vectors), result.tokens)
    return await large_work.run(cost, lambda: render(output.apply(result.vectors), result.tokens))


def openai_response(
    vectors: NDArray[np.generic], tokens: int, encoding: Encoding, model: str
) -> Response:
    """Return OpenAI's list of embeddings, or the bare matrix.

    Args:
        vectors: [texts, columns] of one number type.
        tokens: tokens embedded.
        encoding: NUMBERS and BASE64 give JSON; RAW gives the row-major little-endian matrix with
            shape, type and token count in headers.
        model: name in the answer.
    """
    vectors = _little_endian(vectors)
    if encoding is Encoding.RAW:
        return Response(
            vectors.tobytes(),
            media_type=OCTET_STREAM,
            headers={
                "x-embedding-shape": "{},{}".format(*vectors.shape),
                "x-embedding-dtype": vectors.dtype.name,
                "x-prompt-tokens": str(tokens),
            },
        )
    parts = [b'{"object":"list","model":%b,"data":[' % orjson.dumps(model)]
    if encoding is Encoding.BASE64:
        _write_base64(vectors, parts)
    else:
        _write_numbers(vectors, parts)
    parts.append(b'],"usage":{"prompt_tokens":%d,"total_tokens":%d}}' % (tokens, tokens))
    return Response(b"".join(parts), media_type="application/json")


def write_rows(vectors: NDArray[np.generic], parts: list[bytes]) -> None:
    """Append the rows of a matrix as a JSON list of lists.

    In pieces: orjson holds the interpreter lock while it writes.
    """
    vectors = np.ascontiguousarray(vectors)
    rows_per_call = max(1, DUMP_VALUES // vectors.shape[1])
    start = b"["
    for first in range(0, len(vectors), rows_per_call):
        rows = vectors[first : first + rows_per_call]
        parts += (start, orjson.dumps(rows, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1])
        start = b","
    parts.append(b"]")


def write_rows_base64(vectors: NDArray[np.generic], parts: list[bytes]) -> None:
    """Append the rows of a matrix as a JSON list of strings: little-endian, in base64."""
    start = b'["'
    for row in _little_endian(vectors):
        parts += (start, pybase64.b64encode(row))
        start = b'","'
    parts.append(b'"]')


def types_response(
    vectors: VectorsByType, tokens: int, output: OutputFormat, model: str
) -> Response:
    """Return OpenAI's list of embeddings, each an object with a vector of each type.

    Args:
        vectors: [texts, columns] of each type.
        tokens: tokens embedded.
        output: its names are the keys.
        model: name in the answer.
    """
    columns = {
        name: _little_endian(vectors[kind])
        for name, (kind, _) in zip(output.names, output.answers, strict=True)
    }
    rows_per_call = max(1, DUMP_VALUES // sum(matrix.shape[1] for matrix in columns.values()))
    parts = [b'{"object":"list","model":%b,"data":[' % orjson.dumps(model)]
    rows = len(next(iter(columns.values())))
    for start in range(0, rows, rows_per_call):
        entries = [
            {
                "object": "embedding",
                "index": i,
                "embedding": {
                    name: pybase64.b64encode_as_string(matrix[i])
                    if name == BASE64_NAME
                    else matrix[i]
                    for name, matrix in columns.items()
                },
            }
            for i in range(start, min(start + rows_per_call, rows))
        ]
        if start:
            parts.append(b",")
        parts.append(orjson.dumps(entries, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1])
    parts.append(b'],"usage":{"prompt_tokens":%d,"total_tokens":%d}}' % (tokens, tokens))
    return Response(b"".join(parts), media_type="application/json")


def _write_base64(vectors: NDArray[np.generic], parts: list[bytes]) -> None:
    """Append the entries of a JSON list; nothing in them needs an escape, so orjson is not asked.

    Each copy of an answer counts: with 32 texts this takes half as long as orjson.
    """
    start = b'{"object":"embedding","index":%d,"embedding":"'
    for i, row in enumerate(vectors):
        parts += (start % i, pybase64.b64encode(row))
        start = b'"},{"object":"embedding","index":%d,"embedding":"'
    parts.append(b'"}')


def _write_numbers(vectors: NDArray[np.generic], parts: list[bytes]) -> None:
    """Append the entries in pieces: orjson holds the interpreter lock while it writes."""
    rows_per_call = max(1, DUMP_VALUES // vectors.shape[1])
    for start in range(0, len(vectors), rows_per_call):
        entries = [
            {"object": "embedding", "index": start + i, "embedding": row}
            for i, row in enumerate(vectors[start : start + rows_per_call])
        ]
        if start:
            parts.append(b",")
        parts.append(orjson.dumps(entries, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1])


def _little_endian(vectors: NDArray[np.generic]) -> NDArray[np.generic]:
    little = vectors.dtype.newbyteorder("<")
    return np.ascontiguousarray(vectors, dtype=little)
