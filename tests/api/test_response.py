"""Responses: post-processing and encoding, in the event loop or in a thread."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from starlette.responses import Response

from taskvec.api.response import POSTPROCESS_INLINE_VALUES, VectorsByType, respond
from taskvec.core.job import Embeddings, JobContext
from taskvec.core.output_format import OutputFormat, OutputType

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
    response = await respond(Embeddings(vectors, tokens=7), output, render, context)
    assert response.body == b"answer"
    ((made, tokens),) = found
    assert tokens == 7
    assert (threads[0] is threading.main_thread()) == (rows == 1)
    expected = output.apply(vectors)
    assert all((made[kind] == expected[kind]).all() for kind in output.types)
    context.stages.end()
    assert [stage.name for stage in context.stages.finished] == ["encode"]
