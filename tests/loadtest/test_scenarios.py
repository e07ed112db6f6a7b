"""Requests of the load test."""

from __future__ import annotations

import random
import statistics
from itertools import islice

import orjson
import pytest

from lengths import PASSAGE, QUERY, some_text
from scenarios import RAW, TASKS, TYPES, is_complete, scenarios


@pytest.mark.parametrize(("lengths", "words"), [(QUERY, 5.96), (PASSAGE, 55.98)])
def test_texts_are_as_long_as_those_of_ms_marco(lengths: tuple[float, float], words: float) -> None:
    """The mean length is that of MS MARCO, and some texts are much longer."""
    rng = random.Random(0)
    found = [len(some_text(lengths, rng).split()) for _ in range(4000)]
    assert statistics.mean(found) == pytest.approx(words, rel=0.05)
    assert max(found) > 3 * words


def test_mixed_requests_have_every_task_and_every_output() -> None:
    """Mixed requests have every task and every output type, including raw bytes."""
    requests = list(islice(scenarios()["mixed"].requests(0), 500))
    assert {orjson.loads(request.body)["task"] for request in requests} == set(TASKS)
    assert {request.kind for request in requests} == {*TYPES, "raw"}
    assert {request.headers.get("accept") for request in requests} == {None, RAW}


def test_the_number_of_texts_in_a_bulk_request_can_be_set() -> None:
    """``bulk_texts`` sets the number of texts in a bulk request."""
    request = next(scenarios(bulk_texts=8)["bulk"].requests(0))
    assert request.texts == len(orjson.loads(request.body)["input"]) == 8
    assert request.headers == {"x-priority": "bulk"}


@pytest.mark.parametrize("name", list(scenarios()))
def test_equal_seeds_give_equal_requests_and_others_do_not(name: str) -> None:
    """A run can be repeated, and requests of another seed are not cached."""
    bodies = [
        [request.body for request in islice(scenarios()[name].requests(seed), 20)]
        for seed in (1, 1, 2)
    ]
    assert bodies[0] == bodies[1]
    assert not set(bodies[0]) & set(bodies[2])


def test_a_request_that_names_a_model_names_no_task() -> None:
    """Requests for other servers have a model and no task."""
    fields = orjson.loads(next(scenarios()["bulk"].requests(0, model="merged")).body)
    assert set(fields) == {"input", "encoding_format", "model"}


def test_a_response_without_all_its_vectors_is_incomplete() -> None:
    """A response is complete if it has one vector per text."""
    request = next(scenarios(bulk_texts=2)["bulk"].requests(0))
    one = b'{"object":"embedding","embedding":"AAAA"}'
    assert is_complete(request, "application/json", b"[" + one + b"," + one + b"]")
    assert not is_complete(request, "application/json", b"[" + one + b"]")
    assert is_complete(request, RAW, bytes(8))
    assert not is_complete(request, RAW, b"")
    assert not is_complete(request, RAW, bytes(7))
