"""From a job to its vectors: what is checked first, what the engine sees, who gives room back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from fakes import FakeEngine, hashed_vector
from taskvec.api import text_job
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.core.admission import Admission
from taskvec.core.embedder import AsyncEmbedder
from taskvec.core.health import ServiceHealth
from taskvec.core.job import EmbedJob, JobContext, listed
from taskvec.engines.base import EngineResult, TokenBatch, TokenIds
from taskvec.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    QueueFullError,
    UnavailableError,
)
from taskvec.priority import Priority
from taskvec.service import build_tokenizer, task_table

TOO_LONG = "far too long " * 4000


class FailingEngine(FakeEngine):
    """Is ready, and fails every batch."""

    async def embed(self, batch: TokenBatch) -> EngineResult:
        await super().embed(batch)
        raise UnavailableError("It broke.")


class Service:
    """An embedder in front of a fake engine, and the parts a test looks at."""

    def __init__(self, checkpoint: Checkpoint, engine: FakeEngine, room: int) -> None:
        self.engine = engine
        self.admission = Admission(room)
        self.tokenizer = build_tokenizer(checkpoint, max_tokens=0, threads=1)
        self.tasks = task_table(checkpoint)
        self.embedder = AsyncEmbedder(
            engine, self.tokenizer, self.tasks, self.admission, ServiceHealth(engine)
        )

    def job(self, inputs: Sequence[Any], task: str = "retrieval.query", **fields: Any) -> EmbedJob:
        return EmbedJob(inputs=inputs, task=self.tasks.get(task), **fields)

    def ids(self, text: str, task: str = "retrieval.query") -> TokenIds:
        prompt = self.tasks.get(task).prompt
        return self.tokenizer.encode_now([text], prompt=prompt, truncate=False)[0]


@pytest.fixture
async def service(default_checkpoint: Checkpoint) -> Service:
    """A started engine that answers at once, and room for anything."""
    return await started(default_checkpoint, FakeEngine(default_checkpoint.card))


async def started(checkpoint: Checkpoint, engine: FakeEngine, room: int = 1_000_000) -> Service:
    await engine.start()
    return Service(checkpoint, engine, room)


@pytest.mark.anyio
async def test_a_job_becomes_vectors(service: Service) -> None:
    """Texts get the task's prompt and adapter; the engine's vectors come back in order."""
    texts = ["first", "second text", "third"]
    answer = await service.embedder.embed(service.job(texts, "clustering"))
    (batch,) = service.engine.batches
    expected = [service.ids(text, "clustering") for text in texts]
    assert batch.adapter == "clustering"
    assert [list(ids) for ids in batch.ids] == [list(ids) for ids in expected]
    assert answer.tokens == sum(map(len, expected))
    width = service.embedder.model.dimension
    raw = np.stack([hashed_vector(ids, "clustering", width) for ids in expected])
    assert answer.vectors.dtype == np.float32
    assert np.array_equal(answer.vectors, raw)


def mixed(service: Service, inputs: Sequence[Any], tasks: Sequence[str], **fields: Any) -> EmbedJob:
    """A job whose inputs have tasks of their own."""
    return service.job(inputs, tasks=[service.tasks.get(task) for task in tasks], **fields)


SEVERAL = ["clustering", "retrieval.query", "clustering", "retrieval.passage", "retrieval.query"]


@pytest.mark.anyio
async def test_a_job_of_several_tasks_becomes_vectors_in_order(service: Service) -> None:
    """Each text gets the prompt and the adapter of its task, in one batch for each task."""
    texts = ["a", "a", "b", "a", "c"]
    job = mixed(service, texts, SEVERAL)
    answer = await service.embedder.embed(job)
    assert job.task_name == "mixed"
    assert [batch.adapter for batch in service.engine.batches] == [
        *("clustering", "retrieval", "retrieval")
    ]
    ids = [service.ids(text, task) for text, task in zip(texts, SEVERAL, strict=True)]
    assert answer.tokens == sum(map(len, ids))
    width = service.embedder.model.dimension
    for sent, task, vector in zip(ids, SEVERAL, answer.vectors, strict=True):
        adapter = service.tasks.get(task).adapter
        assert np.array_equal(vector, hashed_vector(sent, adapter, width))


@pytest.mark.anyio
async def test_batches_of_several_tasks_are_submitted_together(
    default_checkpoint: Checkpoint,
) -> None:
    """All batches of a job are in the engine before the first is answered, and charged once."""
    service = await started(default_checkpoint, FakeEngine(default_checkpoint.card, delay=0.2))
    charged: list[int] = []

    async def charge(tokens: int) -> None:
        charged.append(tokens)

    running = asyncio.create_task(
        service.embedder.embed(mixed(service, ["a"] * 5, SEVERAL), JobContext(charge=charge))
    )
    while not service.engine.batches:
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    assert len(service.engine.batches) == 3
    assert service.engine.finished == 0
    answer = await running
    assert charged == [answer.tokens]


class RefusingEngine(FakeEngine):
    """Refuses the last text of each batch of an adapter."""

    async def embed(self, batch: TokenBatch) -> EngineResult:
        result = await super().embed(batch)
        if batch.adapter == "clustering":
            where = f"input[{len(batch.ids) - 1}]"
            raise InvalidRequestError(f"{where} does not fit.", param=where)
        return result


@pytest.mark.anyio
async def test_errors_of_several_tasks_have_the_index_of_the_request(
    default_checkpoint: Checkpoint,
) -> None:
    """The tokenizer's and the engine's errors name the text's place in the whole job."""
    service = await started(default_checkpoint, RefusingEngine(default_checkpoint.card))
    with pytest.raises(InvalidRequestError, match=r"^input\[2\] does not fit") as refused:
        await service.embedder.embed(mixed(service, ["a"] * 5, SEVERAL))
    assert refused.value.param == "input[2]"
    texts = ["a", "a", "a", "a", TOO_LONG]
    with pytest.raises(InvalidRequestError, match=r"^input\[4\] has more") as refused:
        await service.embedder.embed(mixed(service, texts, SEVERAL))
    assert refused.value.param == "input[4]"


def test_the_range_of_an_error_is_renumbered() -> None:
    """An error of several texts names the first and the last of them in the request."""
    error = InvalidRequestError("input[0] to input[2] break it.", param="input[0] to input[2]")
    moved = error.renumbered([3, 5, 8])
    assert (moved.message, moved.param) == (
        "input[3] to input[8] break it.",
        "input[3] to input[8]",
    )
    other = InvalidRequestError("dimensions must be whole.", param="dimensions")
    assert other.renumbered([3]) is other


def test_errors_are_reworded_for_a_client() -> None:
    """A text, and a range of texts, get the client's names; other fields keep theirs."""
    names = text_job.two_fields(text_job.alone("query"), listed("documents"))
    for param, name in (
        ("input[0]", "query"),
        ("input[3]", "documents[2]"),
        ("input[0] to input[2]", "query to documents[1]"),
        ("model", "model"),
    ):
        error = InvalidRequestError(f"{param} is wrong: send truncate: true.", param=param)
        reworded = error.reworded(names, "truncate: END")
        assert reworded.param == name
        advice = "truncate: true" if param == "model" else "truncate: END"
        assert reworded.message == f"{name} is wrong: send {advice}."


@pytest.mark.anyio
async def test_the_stages_are_those_of_the_engine(default_checkpoint: Checkpoint) -> None:
    """Seconds of queue and engine are what the engine says, the others are measured here."""
    engine = FakeEngine(default_checkpoint.card, delay=0.01)
    service = await started(default_checkpoint, engine)
    context = JobContext()
    await service.embedder.embed(service.job(["a text"]), context)
    stages = context.stages.finished
    assert [stage.name for stage in stages] == ["tokenize", "queue", "engine"]
    tokenize, queue, engine_ = (stage.seconds for stage in stages)
    assert (queue, engine_) == (0.0, 0.01)
    assert 0 <= tokenize < 10


@pytest.mark.anyio
async def test_token_ids_are_embedded_as_they_are(service: Service) -> None:
    """Token ids get no prompt and no special tokens; the task still picks the adapter."""
    ids = [np.array([5, 6, 7], np.int32), np.array([8], np.int32)]
    answer = await service.embedder.embed(service.job(ids, "retrieval.query"))
    (batch,) = service.engine.batches
    assert [list(given) for given in batch.ids] == [[5, 6, 7], [8]]
    assert batch.adapter == "retrieval"
    assert answer.tokens == 4


@pytest.mark.anyio
async def test_nothing_is_tokenised_for_an_engine_that_is_not_ready(
    default_checkpoint: Checkpoint,
) -> None:
    """Before the start and after the stop a job is refused as unavailable, whatever its texts."""
    service = Service(default_checkpoint, FakeEngine(default_checkpoint.card), 1000)
    with pytest.raises(UnavailableError) as refused:
        await service.embedder.embed(service.job([TOO_LONG]))
    assert refused.value.code == "starting"
    assert refused.value.retry_after is not None
    await service.engine.start()
    with pytest.raises(InvalidRequestError) as too_long:
        await service.embedder.embed(service.job([TOO_LONG]))
    assert too_long.value.code == "input_too_long"
    await service.engine.stop()
    with pytest.raises(UnavailableError):
        await service.embedder.embed(service.job([TOO_LONG]))


@pytest.mark.anyio
async def test_truncate_reaches_the_tokenizer(service: Service) -> None:
    """What is too long is cut when asked for, and only what is left is counted."""
    answer = await service.embedder.embed(service.job([TOO_LONG], truncate=True))
    assert answer.tokens == service.embedder.max_tokens == len(service.engine.batches[0].ids[0])


@pytest.mark.anyio
async def test_a_bad_text_takes_no_room_and_no_engine(service: Service) -> None:
    """A text that cannot be embedded is refused before admission."""
    with pytest.raises(InvalidRequestError, match=r"input\[1\]"):
        await service.embedder.embed(service.job(["good", TOO_LONG]))
    assert service.engine.batches == []
    assert service.admission.tokens == 0


@pytest.mark.anyio
async def test_a_full_tokenizer_refuses_and_frees(service: Service) -> None:
    """Too many waiting characters are refused as a full queue is; a short text is not."""
    texts = ["q" * 99 + "\u16a0 "] * 2048
    long = service.job([text * 80 for text in texts], deadline=time.monotonic() + 600)
    first, second = (asyncio.create_task(service.embedder.embed(long)) for _ in range(2))
    await asyncio.sleep(0.05)
    with pytest.raises(QueueFullError, match="characters of bulk requests") as refused:
        await service.embedder.embed(long)
    assert refused.value.retry_after is not None
    await service.embedder.embed(service.job(["a text"]))
    for task in (first, second):
        task.cancel()
    await asyncio.gather(first, second, return_exceptions=True)
    await service.embedder.embed(service.job(["some words " * 100]))
    assert len(service.engine.batches) == 2


@pytest.mark.anyio
async def test_a_deadline_ends_the_tokenising(service: Service) -> None:
    """A request that takes too long to tokenise is told so in time, and others have their turns."""
    texts = [("q" * 99 + "\u16a0 ") * 100] * 1000
    began = time.monotonic()
    with pytest.raises(DeadlineExceededError):
        await service.embedder.embed(service.job(texts, deadline=began + 0.1))
    await service.embedder.embed(service.job(["some words " * 100]))
    assert time.monotonic() - began < 2
    assert len(service.engine.batches) == 1


@pytest.mark.anyio
async def test_a_full_queue_refuses_and_frees(default_checkpoint: Checkpoint) -> None:
    """While the budget is taken another job is refused; once it is answered there is room."""
    engine = FakeEngine(default_checkpoint.card, delay=0.2)
    service = await started(default_checkpoint, engine, room=8)
    first = asyncio.create_task(service.embedder.embed(service.job(["one two three"])))
    await in_the_engine(engine, 1)
    with pytest.raises(QueueFullError) as refused:
        await service.embedder.embed(service.job(["four five six"]))
    assert refused.value.retry_after is not None
    assert len(engine.batches) == 1
    await first
    assert service.admission.tokens == 0
    await service.embedder.embed(service.job(["four five six"]))


@pytest.mark.anyio
async def test_a_deadline_ends_the_engine_call(default_checkpoint: Checkpoint) -> None:
    """When the deadline passes the engine call is cancelled, the room is freed, the client told."""
    engine = FakeEngine(default_checkpoint.card, delay=600)
    service = await started(default_checkpoint, engine)
    deadline = time.monotonic() + 0.1
    with pytest.raises(DeadlineExceededError) as passed:
        await service.embedder.embed(service.job(["a text"], deadline=deadline))
    assert passed.value.status == 504
    assert engine.batches[0].deadline == deadline
    assert engine.cancelled == 1
    assert service.admission.tokens == 0


@pytest.mark.anyio
async def test_a_deadline_in_the_past_embeds_nothing(default_checkpoint: Checkpoint) -> None:
    """A job that is late before it starts is told so without an answer from the engine."""
    engine = FakeEngine(default_checkpoint.card, delay=600)
    service = await started(default_checkpoint, engine)
    with pytest.raises(DeadlineExceededError):
        await service.embedder.embed(service.job(["a text"], deadline=time.monotonic() - 5))
    assert service.admission.tokens == 0


@pytest.mark.anyio
async def test_a_deadline_that_is_kept_changes_nothing(service: Service) -> None:
    """With time to spare the vectors are those without a deadline."""
    free = await service.embedder.embed(service.job(["a text"]))
    bound = service.job(["a text"], deadline=time.monotonic() + 600)
    assert np.array_equal((await service.embedder.embed(bound)).vectors, free.vectors)


@pytest.mark.anyio
@pytest.mark.parametrize("deadline", [None, 600])
async def test_a_cancelled_job_frees_its_room(
    default_checkpoint: Checkpoint, deadline: float | None
) -> None:
    """When the client goes away the engine call is cancelled and its room is free."""
    engine = FakeEngine(default_checkpoint.card, delay=600)
    service = await started(default_checkpoint, engine)
    until = None if deadline is None else time.monotonic() + deadline
    job = asyncio.create_task(service.embedder.embed(service.job(["a text"], deadline=until)))
    await in_the_engine(engine, 1)
    assert service.admission.tokens == len(service.ids("a text"))
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    assert engine.cancelled == 1
    assert service.admission.tokens == 0


@pytest.mark.anyio
async def test_a_failed_job_frees_its_room(default_checkpoint: Checkpoint) -> None:
    """The engine's error reaches the caller as it is, and its room is free."""
    service = await started(default_checkpoint, FailingEngine(default_checkpoint.card))
    with pytest.raises(UnavailableError, match="It broke"):
        await service.embedder.embed(service.job(["a text"]))
    assert len(service.engine.batches) == 1
    assert service.admission.tokens == 0


@pytest.mark.anyio
@pytest.mark.parametrize("requested", Priority)
async def test_more_than_a_batch_is_bulk(
    default_checkpoint: Checkpoint, requested: Priority
) -> None:
    """The engine gets the class that was requested, and bulk for more than one of its batches."""
    engine = FakeEngine(default_checkpoint.card)
    service = await started(default_checkpoint, engine)
    text = "one two three"
    engine.batch_tokens = 2 * len(service.ids(text))
    for texts in (1, 2, 3):
        await service.embedder.embed(service.job([text] * texts, priority=requested))
    assert [batch.priority for batch in engine.batches] == [requested, requested, Priority.BULK]


@pytest.mark.anyio
async def test_a_refused_request_of_several_batches_closes_its_own_class(
    default_checkpoint: Checkpoint,
) -> None:
    """What is bulk for the engine alone is admitted, and shed, in the class that it requested."""
    engine = FakeEngine(default_checkpoint.card, delay=0.2)
    service = await started(default_checkpoint, engine, room=8)
    engine.batch_tokens = 2
    first = asyncio.create_task(service.embedder.embed(service.job(["one two three four five"])))
    await in_the_engine(engine, 1)
    assert engine.batches[0].priority is Priority.BULK
    with pytest.raises(QueueFullError):
        await service.embedder.embed(service.job(["four five six"]))
    with pytest.raises(QueueFullError):
        service.admission.require_room(Priority.INTERACTIVE)
    service.admission.require_room(Priority.BULK)
    await first


async def in_the_engine(engine: FakeEngine, batches: int) -> None:
    """Wait until the engine has been handed so many batches."""
    async with asyncio.timeout(60):
        while len(engine.batches) < batches:
            await asyncio.sleep(0.001)
