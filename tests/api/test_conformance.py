"""The service against its own OpenAPI document: every route, right and wrong requests."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from schemathesis.config import GenerationConfig, PositiveDataAcceptanceConfig, SchemathesisConfig
from schemathesis.schemas import BaseSchema

from conftest import fake_application
from fakes import FakeEngine
from sockets import Served, served
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.checkpoint.open import DEFAULT_MODEL, open_checkpoint

EXAMPLES = 500
"""Most generated requests an operation, beside those that cover each keyword of its schema."""

BETWEEN_DIALECT_FIELDS = re.compile(
    "name one|differs from|disagree|multiple of 8|more than the|nothing that the tokenizer turns"
)
"""The same in the messages of dialects, whose errors have no code."""

BETWEEN_FIELDS = {
    "conflicting_fields",
    "missing_input",
    "invalid_dimensions",
    "invalid_embedding_type",
    "input_too_long",
    "empty_input",
}
"""What a schema of single fields cannot say: spellings and tasks that disagree, dimensions that are
no multiple of 8 for the binary types, float16 in JSON, texts of too many tokens
or, like a space, of none, and null in each of the input's names."""

SETTINGS: dict[str, Any] = {"token_input": "accept", "max_texts": 50, "ui": False}
"""Without the page, which is no part of the API: it would add GET to what a 405 of / allows."""


def document() -> BaseSchema:
    """What the service says of itself; read here because pytest asks for it before fixtures."""
    checkpoint = open_checkpoint(DEFAULT_MODEL)
    app = fake_application(checkpoint, FakeEngine(checkpoint.card), [], **SETTINGS)
    config = SchemathesisConfig()
    default = config.projects.default
    default.generation = GenerationConfig(max_examples=EXAMPLES, deterministic=True)
    accepted = ["2xx", "400", "404"]  # a 400 is looked at below
    default.checks.positive_data_acceptance = PositiveDataAcceptanceConfig(
        expected_statuses=accepted
    )
    return schemathesis.openapi.from_dict(app.openapi(), config=config)


described = document()


@pytest.fixture(scope="module")
def service(default_checkpoint: Checkpoint) -> Iterator[Served]:
    with served(default_checkpoint, **SETTINGS) as service:
        yield service
        assert service.sample("taskvec_requests_total", status="200") > 100
        assert service.sample("taskvec_requests_total", status="500") == 0
        assert service.sample("taskvec_requests_total", status="400") > 100
        assert service.sample("taskvec_queue_tokens") == 0


@described.parametrize()
def test_every_answer_is_as_described(case: schemathesis.Case, service: Served) -> None:
    """No 500, no other status, type or form than the document has; what it forbids is refused."""
    answer = case.call_and_validate(base_url=f"http://127.0.0.1:{service.port}")
    if answer.status_code == 400 and case.meta.generation.mode.is_positive:
        body = answer.json()
        if "code" in body:
            known = body["code"] in BETWEEN_FIELDS
        else:
            known = bool(BETWEEN_DIALECT_FIELDS.search(answer.text))
        assert known or holds_float(case.body), answer.text


def holds_float(value: Any) -> bool:
    """To a schema 1.0 is an integer; to the service it is none."""
    if isinstance(value, dict | list):
        return any(map(holds_float, value.values() if isinstance(value, dict) else value))
    return isinstance(value, float)
