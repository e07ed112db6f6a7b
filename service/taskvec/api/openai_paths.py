"""Other paths of /v1/embeddings: without /v1, and Azure OpenAI's deployments."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from taskvec.api import fields, openai
from taskvec.api.dialect import embedding_handler
from taskvec.api.endpoint import Route
from taskvec.api.openai import OpenAIDialect
from taskvec.api.request import RequestLimits
from taskvec.api.response import VectorsByType
from taskvec.auth.keys import Key
from taskvec.core.job import EmbedJob
from taskvec.core.output_format import OutputFormat
from taskvec.core.tasks import ServedNames
from taskvec.dialects import DialectName
from taskvec.errors import InvalidRequestError, NotFoundError
from taskvec.service import Service

WITHOUT_VERSION = "/embeddings"

AZURE_V1 = "/openai/v1/embeddings"
"""Path of the newest version of Azure's API, whose model is in the body."""

DEPLOYMENTS = {
    "/openai/deployments/{model:path}/embeddings": "azure_create_embeddings",
    "/v1/deployments/{model:path}/embeddings": "azure_create_embeddings_v1",
}
"""Paths of Azure OpenAI's clients, by whether they are given an endpoint or a base URL."""

MODEL = {
    "name": "model",
    "in": "path",
    "required": True,
    "description": "A served name, or name:task.",
}


class Deployment:
    """The dialect of /v1/embeddings for a model that the path names."""

    def __init__(self, dialect: OpenAIDialect, names: ServedNames, model: str) -> None:
        """Translate for one request.

        Args:
            dialect: translates all but the model.
            names: of the served model.
            model: name in the path.
        """
        self._dialect = dialect
        self._names = names
        self._model = model

    def read(
        self, body: Any, headers: Mapping[str, str], key: Key | None
    ) -> tuple[EmbedJob, OutputFormat]:
        """See ``Dialect.read``.

        The path names the model, whatever the body says: some clients send the name of OpenAI's
        model that they would have deployed. A served name with another task is refused.
        """
        if isinstance(body, dict):
            named = fields.string(body.get("model"), "model")
            if named is not None and self._is_another_task(named):
                raise InvalidRequestError(
                    f"The path names the model {self._model[:200]!r}, the field model names "
                    f"{named[:200]!r}: name one.",
                    code="conflicting_fields",
                    param="model",
                )
            body = {**body, "model": self._model}
        return self._dialect.read(body, headers, key)

    def _is_another_task(self, named: str) -> bool:
        """Return whether a name is ``model:task``, and the path names another task or none."""
        try:
            task = self._names.task_suffix(named)
        except NotFoundError:
            return False
        return task is not None and task != self._names.task_suffix(self._model)

    def render(self, vectors: VectorsByType, output: OutputFormat, tokens: int) -> Response:
        """See ``Dialect.render``."""
        return self._dialect.render(vectors, output, tokens)


def routes(service: Service, limits: RequestLimits) -> list[Route]:
    """Return a route for each path."""
    (route,) = openai.routes(service, limits)
    dialect = OpenAIDialect(service.embedder, service.names, limits)

    async def embed(request: Request) -> Response:
        deployment = Deployment(dialect, service.names, request.path_params["model"])
        handler = embedding_handler(deployment, service.embedder, limits, service.large_work)
        return await handler(request)

    models = [
        *service.names.all,
        *(f"{name}:{task}" for name in service.names.all for task in service.embedder.tasks.names),
    ]
    parameter = {**MODEL, "schema": {"enum": models}}
    return [
        dataclasses.replace(
            route,
            path=WITHOUT_VERSION,
            openapi={**route.openapi, "operationId": "create_embeddings_without_version"},
        ),
        dataclasses.replace(
            route,
            path=AZURE_V1,
            dialect=DialectName.AZURE,
            summary="Embed texts, as Azure OpenAI does",
            openapi={**route.openapi, "operationId": "azure_create_embeddings_openai_v1"},
        ),
        *(
            dataclasses.replace(
                route,
                path=path,
                handler=embed,
                dialect=DialectName.AZURE,
                summary="Embed texts, as Azure OpenAI does",
                openapi={**route.openapi, "operationId": name, "parameters": [parameter]},
            )
            for path, name in DEPLOYMENTS.items()
        ),
    ]
