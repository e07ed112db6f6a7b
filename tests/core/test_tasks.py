"""Task names: which adapter and prompt each means, aliases, fields that must agree."""

from __future__ import annotations

from dataclasses import astuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskvec.core.tasks import INPUT_TYPES, TaskTable
from taskvec.errors import InvalidRequestError

JINA = ["retrieval", "text-matching", "clustering", "classification"]
PROMPTS = {"query": "Query: ", "document": "Document: "}


@pytest.fixture
def table() -> TaskTable:
    return TaskTable(JINA, PROMPTS, None)


@pytest.mark.parametrize(
    ("task", "adapter", "prompt"),
    [
        ("retrieval.query", "retrieval", "Query: "),
        ("retrieval.passage", "retrieval", "Document: "),
        ("text-matching", "text-matching", "Document: "),
        ("clustering", "clustering", "Document: "),
        ("classification", "classification", "Document: "),
    ],
)
def test_each_task_means_an_adapter_and_a_prompt(
    table: TaskTable, task: str, adapter: str, prompt: str
) -> None:
    """The five tasks of jina-embeddings-v5 are the four adapters, retrieval with a side each."""
    assert astuple(table.get(task)) == (task, adapter, prompt)


def test_the_tasks_are_listed_in_the_order_of_the_checkpoint(table: TaskTable) -> None:
    """Names and iteration give every task once."""
    expected = ["retrieval.query", "retrieval.passage", *JINA[1:]]
    assert table.names == expected
    assert [task.name for task in table] == expected


@pytest.mark.parametrize(
    ("alias", "task"), [("retrieval", "retrieval.passage"), ("separation", "clustering")]
)
def test_aliases(table: TaskTable, alias: str, task: str) -> None:
    """Names of the hosted API's older models mean the same tasks here."""
    assert table.get(alias) is table.get(task)


def test_every_other_adapter_is_a_task_of_its_own() -> None:
    """A checkpoint's own adapters are served by their names, with the document prompt."""
    table = TaskTable(["legal", "code"], PROMPTS, "query")
    assert [astuple(task) for task in table] == [
        ("legal", "legal", "Document: "),
        ("code", "code", "Document: "),
    ]


def test_an_adapter_may_have_prompts_of_its_own() -> None:
    """With a query prompt it has two sides, like retrieval; without one it has one."""
    own = {"legal": {"query": "Case: ", "document": "Law: "}, "code": {"document": "Source: "}}
    table = TaskTable(["legal", "code"], PROMPTS, None, own)
    assert [astuple(task) for task in table] == [
        ("legal.query", "legal", "Case: "),
        ("legal.passage", "legal", "Law: "),
        ("code", "code", "Source: "),
    ]
    assert table.get("legal") is table.get("legal.passage")


@pytest.mark.parametrize(
    ("adapters", "default"),
    [
        (JINA, "text-matching"),
        (JINA[::-1], "text-matching"),
        (["clustering", "classification"], "clustering"),
        (["retrieval"], "retrieval.query"),
        (["legal"], "legal"),
    ],
)
def test_the_default_task(adapters: list[str], default: str) -> None:
    """Silence means text-matching, or the checkpoint's first task where it has none such."""
    table = TaskTable(adapters, PROMPTS, None)
    assert table.default.name == default
    assert table.choose({"task": None, "input_type": None}) is table.default
    assert table.choose({}) is table.default


@pytest.mark.parametrize(
    ("default_prompt", "prompt"), [(None, ""), ("document", "Document: "), ("query", "Query: ")]
)
def test_a_checkpoint_without_adapters_has_one_task(
    default_prompt: str | None, prompt: str
) -> None:
    """A bare backbone embeds in one way, with its default prompt."""
    table = TaskTable([], PROMPTS, default_prompt)
    (task,) = table
    assert task.adapter is None
    assert task.prompt == prompt
    assert table.default is task


def test_missing_prompts_are_empty() -> None:
    """Where a checkpoint has no prompts, nothing is put before the text."""
    assert {task.prompt for task in TaskTable(JINA, {}, None)} == {""}


@pytest.mark.parametrize("name", ["", "Retrieval.query", "text_matching", "x" * 5000])
def test_an_unknown_task_is_refused_with_the_known_ones(table: TaskTable, name: str) -> None:
    """The message lists the tasks there are, and quotes no more than a name's length."""
    with pytest.raises(InvalidRequestError, match=r"retrieval\.query, .*classification") as refused:
        table.get(name, param="model")
    assert (refused.value.code, refused.value.param) == ("unknown_task", "model")
    assert len(refused.value.message) < 300


@pytest.mark.parametrize(
    ("input_type", "task"),
    [
        ("query", "retrieval.query"),
        ("search_query", "retrieval.query"),
        ("document", "retrieval.passage"),
        ("search_document", "retrieval.passage"),
        ("classification", "classification"),
        ("clustering", "clustering"),
    ],
)
def test_input_types(table: TaskTable, input_type: str, task: str) -> None:
    """What Voyage, Cohere and Jina clients say instead of a task."""
    assert table.choose({"input_type": input_type}) is table.get(task)


def test_an_unknown_input_type_is_refused_with_the_known_ones(table: TaskTable) -> None:
    """A task's name is no input type: the field has words of its own."""
    with pytest.raises(InvalidRequestError, match="search_query") as refused:
        table.choose({"task": None, "input_type": "text-matching"})
    assert (refused.value.code, refused.value.param) == ("unknown_task", "input_type")


def test_an_input_type_that_the_checkpoint_lacks_is_refused() -> None:
    """An input type whose task the checkpoint has no adapter for is not answered by another."""
    with pytest.raises(InvalidRequestError, match="classification") as refused:
        TaskTable(["clustering"], PROMPTS, None).choose({"input_type": "classification"})
    assert (refused.value.code, refused.value.param) == ("unknown_task", "input_type")


def test_fields_that_agree_name_one_task(table: TaskTable) -> None:
    """An alias, an input type and a model suffix may all say the same."""
    named = {"model": "retrieval.passage", "task": "retrieval", "input_type": "document"}
    assert table.choose(named).name == "retrieval.passage"


TASK_NAMES = ["retrieval.query", "retrieval.passage", *JINA, "separation"]


@given(
    model=st.none() | st.sampled_from(TASK_NAMES),
    task=st.none() | st.sampled_from(TASK_NAMES),
    input_type=st.none() | st.sampled_from(sorted(INPUT_TYPES)),
)
def test_fields_agree_or_are_refused(
    model: str | None, task: str | None, input_type: str | None
) -> None:
    """Whatever is named is obeyed; two different tasks are refused, naming both."""
    table = TaskTable(JINA, PROMPTS, None)
    named = {"model": model, "task": task, "input_type": input_type}
    meant = {table.get(name).name for name in (model, task) if name is not None}
    if input_type is not None:
        meant.add(INPUT_TYPES[input_type])
    if len(meant) <= 1:
        assert table.choose(named).name == (meant.pop() if meant else "text-matching")
        return
    with pytest.raises(InvalidRequestError, match="name one") as refused:
        table.choose(named)
    assert refused.value.code == "conflicting_fields"
    assert sum(name in refused.value.message for name in meant) >= 2
    assert refused.value.param in [field for field, name in named.items() if name is not None][1:]


def test_sides_are_a_query_and_a_passage() -> None:
    """Both tasks of an adapter are found by their common name; retrieval is the default."""
    own = {"support": {"query": "Q: ", "document": "D: "}}
    prompts = {"query": "Query: ", "document": "Document: "}
    table = TaskTable(["support", "clustering", "retrieval"], prompts, None, own)
    assert table.both == ["support", "retrieval"]
    assert [task.name for task in table.sides(None)] == ["retrieval.query", "retrieval.passage"]
    assert [task.prompt for task in table.sides("support")] == ["Q: ", "D: "]
    with pytest.raises(InvalidRequestError, match="send model:support, model:retrieval"):
        table.sides("clustering")
    alone = TaskTable(["support"], prompts, None, own)
    assert alone.sides(None)[0].name == "support.query"
    for name in (None, "clustering"):
        with pytest.raises(InvalidRequestError, match="so it does not rank: it has clustering"):
            TaskTable(["clustering"], prompts, None).sides(name)
