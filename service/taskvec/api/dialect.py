"""What an API dialect has to provide, and the handler that serves it.

A dialect translates: a JSON body to a job and an output format, vectors to a response. Reading the
body, deadlines, disconnects, embedding and post-processing are the same for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from taskvec.api.context import context_of
from taskvec.api.endpoint import Handler
from taskvec.api.request import RequestLimits, cancel_on_disconnect, header_dict, read_json
from taskvec.api.response import VectorsByType, answer_bytes, respond
from taskvec.auth.keys import Key
from taskvec.concurrency import LargeWork
from taskvec.core.embedder import AsyncEmbedder
from taskvec.core.job import EmbedJob
from taskvec.core.output_format import OutputFormat
from taskvec.errors import TaskvecError


class Dialect(Protocol):
    """One embedding API: its requests and responses."""

    def read(
        self, body: Any, headers: Mapping[str, str], key: Key | None
    ) -> tuple[EmbedJob, OutputFormat]:
        """Translate a JSON body; may run in a thread. The handler checks the dimensions.

        Raises:
            InvalidRequestError: names the field at fault.
            NotFoundError: unknown model.
        """

    def render(self, vectors: VectorsByType, output: OutputFormat, tokens: int) -> Response:
        """Write the response; may run in a thread.

        Args:
            vectors: post-processed, for each of the format's types.
            output: the format that ``read`` returned.
            tokens: tokens embedded.
        """


def embedding_handler(
    dialect: Dialect, embedder: AsyncEmbedder, limits: RequestLimits, large_work: LargeWork
) -> Handler:
    """Return the handler of a dialect's route.

    Args:
        dialect: translates requests and responses.
        embedder: runs the jobs.
        limits: limits of a request.
        large_work: of the process.
    """

    async def embed(request: Request) -> Response:
        context = context_of(request.scope)
        headers = header_dict(request.scope)
        job, output = await read_json(
            request.receive,
            headers,
            limits,
            context.memory,
            lambda body: dialect.read(body, headers, context.key),
            large_work=large_work,
        )
        context.task, context.texts, context.output = job.task_name, len(job.inputs), output
        output.check(embedder.model.dimension)
        if context.memory is not None:
            if context.memory.bytes:  # the texts of an uncounted body are not counted either
                context.input_bytes = job.input_bytes
            vectors = answer_bytes(len(job.inputs), embedder.model.dimension, output)
            if job.tasks is not None:  # the vectors of each task are copied into one array
                vectors += 4 * len(job.inputs) * embedder.model.dimension
            context.memory.resize(context.input_bytes + vectors)
        try:
            result = await cancel_on_disconnect(request.receive, embedder.embed(job, context))
        except TaskvecError as error:
            raise error.reworded(job.text_name, job.truncation) from None
        context.tokens = result.tokens
        return await respond(
            result,
            output,
            lambda vectors, tokens: dialect.render(vectors, output, tokens),
            context,
            large_work,
        )

    return embed
