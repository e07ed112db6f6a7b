"""Responses: post-processing and encoding, in the event loop or in a thread."""

from __future__ import annotations

import base64
import json
import threading

import numpy as np
import pytest
from starlette.responses import Response

from taskvec.api.response import (
    POSTPROCESS_INLINE_VALUES,
    VectorsByType,
    openai_response,
    respond,
)
from taskvec.concurrency import LargeWork
from taskvec.core.job import Embeddings, JobContext
from taskvec.core.output_format import Encoding, OutputFormat, OutputType

WIDTH = 256


@pytest.mark.anyio
@pytest.mark.parametrize("rows", [1, POSTPROCESS_INLINE_VALUES // WIDTH + 1])
async def test_a_large_answer_is_made_in_a_thread_and_like_a_small_one(rows: int) -> None:
    """What would block the event loop is done in a thread, with the same result."""
    vectors = np.random.default_rng(0).standard_normal((rows, WIDTH)).astype(np.float32)
    output = OutputFormat(128, (OutputType.INT8, OutputType.FLOAT))
    threads: list[threading.Thread] = []
    found: list[tuple[VectorsByType, int]] = []

    def render(vectors: VectorsByType, tokens: int) -> Response:
        threads.append(threading.current_thread())
        found.append((vectors, tokens))
        return Response(b"answer")

    context = JobContext()
    response = await respond(Embeddings(vectors, tokens=7), output, render, context, LargeWork())
    assert response.body == b"answer"
    ((made, tokens),) = found
    assert tokens == 7
    assert (threads[0] is threading.main_thread()) == (rows == 1)
    expected = output.apply(vectors)
    assert all((made[kind] == expected[kind]).all() for kind in output.types)
    context.stages.end()
    assert [stage.name for stage in context.stages.finished] == ["encode"]


@pytest.mark.parametrize("rows", [1, 2, 700])
@pytest.mark.parametrize("encoding", [Encoding.BASE64, Encoding.NUMBERS])
def test_a_body_written_in_pieces_is_one_json_list(rows: int, encoding: Encoding) -> None:
    """Entries are in order, vectors unchanged, and a model's name is escaped."""
    vectors = np.random.default_rng(0).standard_normal((rows, WIDTH)).astype(np.float32)
    answer = json.loads(openai_response(vectors, 7, encoding, 'a "name"').body)
    assert answer["model"] == 'a "name"'
    assert answer["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    assert [entry["index"] for entry in answer["data"]] == list(range(rows))
    for entry, vector in zip(answer["data"], vectors, strict=True):
        assert entry.keys() == {"object", "index", "embedding"}
        found = entry["embedding"]
        if encoding is Encoding.BASE64:
            found = np.frombuffer(base64.b64decode(found), "<f4")
        assert (np.array(found, np.float32) == vector).all()
