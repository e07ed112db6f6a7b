"""Checkpoints with one adapter merged into their weights: their task, and their vectors.

peft merges the adapter and transformers writes the weights and the config, so that the checkpoints
are not made by the code under test.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel
from structlog.testing import capture_logs
from tokenizers import Tokenizer

from conftest import DEFAULT_VOCABULARY, fake_service
from fakes import FakeEngine, hashed_vector
from oracle import PLAIN, Oracle
from processes import EXACT, embed, served
from synthetic import ADAPTERS, TINY_NANO, TINY_SMALL, write_checkpoint
from taskvec import Embedder
from taskvec.checkpoint.checkpoint import Checkpoint, read_checkpoint
from taskvec.checkpoint.open import open_checkpoint
from taskvec.errors import CheckpointError
from taskvec.evaluation.models import LoadedModel, sides_of
from taskvec.service import task_table

SIZES = {"small": TINY_SMALL, "nano": TINY_NANO}
PROMPTS = {"query": "Query: ", "document": "Document: "}
SIDES = {"retrieval.query": "Query: ", "retrieval.passage": "Document: "}
TASKS = {"retrieval": SIDES} | {name: {name: "Document: "} for name in ADAPTERS[1:]}
"""Adapter -> the tasks and prompts of a repository into whose weights it is merged."""
TEXTS = ["How do I reset my password?", "Open the settings, then choose Security. " * 9]
FP32_DIFFERENCE = 1e-5
PROMPTS_FILE = "config_sentence_transformers.json"


@dataclass(frozen=True)
class Repositories:
    """A checkpoint with adapters, and the repository of each adapter merged into its weights."""

    architecture: str
    base: Path
    merged: dict[str, Path]


@pytest.fixture(scope="module", params=SIZES)
def repositories(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Repositories:
    """Each architecture of Jina's models, with random weights."""
    room = tmp_path_factory.mktemp(request.param)
    shape = replace(SIZES[request.param], vocabulary=DEFAULT_VOCABULARY, layers=2)
    base = write_checkpoint(room / f"jina-embeddings-v5-text-{request.param}", shape, seed=5)
    plain = write_checkpoint(room / "plain", shape, seed=5, jina=False, adapters=())
    merged = {name: merge(base, plain, shape.architecture, name) for name in ADAPTERS}
    return Repositories(shape.architecture, base, merged)


def merge(base: Path, plain: Path, architecture: str, adapter: str) -> Path:
    """Write the repository of one adapter in the layout that is on the hub."""
    folder = base.parent / f"{base.name}-{adapter}"
    config_class, model_class = PLAIN[architecture]
    config = config_class.from_pretrained(plain, pad_token_id=0)  # EuroBERT's is in its vocabulary
    model = model_class.from_pretrained(plain, config=config, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(model, base / "adapters" / adapter)
    adapted.merge_and_unload().save_pretrained(folder)
    for name in (PROMPTS_FILE, "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, folder)
    return folder


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_merged_repository_gives_the_vectors_of_the_adapter(
    repositories: Repositories, adapter: str, tmp_path: Path
) -> None:
    """Each task has its prefix: vectors equal those of the adapter, and of transformers."""
    folder = repositories.merged[adapter]
    oracle = Oracle(folder, repositories.architecture, (), tmp_path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with (
        Embedder(str(folder), dtype="float32") as merged,
        Embedder(str(repositories.base), dtype="float32") as adapters,
    ):
        assert merged.tasks == list(TASKS[adapter])
        for task, prompt in TASKS[adapter].items():
            vectors = merged.embed(TEXTS, task)
            ids = [np.array(tokenizer.encode(prompt + text).ids, np.int32) for text in TEXTS]
            truth = np.stack([oracle.embed(text, None) for text in ids])
            assert difference(vectors, truth) <= FP32_DIFFERENCE
            assert difference(vectors, adapters.embed(TEXTS, task)) <= FP32_DIFFERENCE
        default = "retrieval.passage" if adapter == "retrieval" else adapter
        assert np.array_equal(merged.embed(TEXTS), merged.embed(TEXTS, default))


def test_the_evaluation_embeds_queries_as_queries(repositories: Repositories) -> None:
    """`taskvec eval` sees one adapter with a task for queries and one for passages."""
    with Embedder(str(repositories.merged["retrieval"])) as embedder:
        model = LoadedModel(embedder)
        assert sides_of(model.tasks) == {"retrieval": tuple(SIDES)}
        rows = [model.embed(TEXTS, task, lambda _: None) for task in SIDES]
        assert difference(*rows) > 0.01


def test_the_config_is_that_of_a_plain_backbone(repositories: Repositories) -> None:
    """The tested repositories have neither adapters nor a model type of Jina's."""
    for folder in repositories.merged.values():
        assert read_config(folder)["model_type"] == repositories.architecture
        assert not (folder / "adapters").exists()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain checkpoint with the prompts of Jina's repositories."""
    shape = replace(TINY_SMALL, vocabulary=DEFAULT_VOCABULARY, layers=1, hidden=32, intermediate=48)
    folder = tmp_path_factory.mktemp("template") / "template"
    return write_checkpoint(folder, shape, jina=False, adapters=())


@pytest.mark.parametrize(
    ("name", "tasks"),
    [
        ("jina-embeddings-v5-text-nano-retrieval", SIDES),
        ("jina-embeddings-v5-text-small-text-matching", TASKS["text-matching"]),
        ("jina-embeddings-v5-text-small-clustering", TASKS["clustering"]),
        ("my_classification", TASKS["classification"]),
        ("Mine.Text_Matching", TASKS["text-matching"]),
        ("clustering", TASKS["clustering"]),
        ("model", SIDES),
        ("clustering-base", SIDES),
        ("reclustering", SIDES),
    ],
)
def test_the_end_of_the_name_is_the_task(
    template: Path, tmp_path: Path, name: str, tasks: dict[str, str]
) -> None:
    """The last word of a folder's name is the task; without one, both prompts mean retrieval."""
    assert prompts_of(open_checkpoint(str(linked(template, tmp_path / name)))) == tasks


@pytest.mark.parametrize("name", ["jinaai/tiny-clustering", "someone/clustering"])
def test_a_hub_id_names_the_task(template: Path, tmp_path: Path, name: str) -> None:
    """The part of a hub id after the slash names the task, wherever the files are."""
    folder = linked(template, tmp_path / "snapshot")
    assert prompts_of(read_checkpoint(folder, name)) == TASKS["clustering"]


def test_the_folder_of_the_hub_cache_names_the_task(template: Path, tmp_path: Path) -> None:
    """A snapshot in the hub's cache is named after its repository, also through a link."""
    cache = tmp_path / "models--jinaai--jina-embeddings-v5-text-nano-clustering"
    snapshot = linked(template, cache / "snapshots" / ("a" * 40))
    (tmp_path / "model").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "model"):
        assert prompts_of(open_checkpoint(str(folder))) == TASKS["clustering"]


def test_names_that_disagree_are_refused(template: Path, tmp_path: Path) -> None:
    """A link and its folder that name different tasks need the operator's word."""
    folder = linked(template, tmp_path / "tiny-clustering")
    link = tmp_path / "tiny-retrieval"
    link.symlink_to(folder)
    with pytest.raises(CheckpointError, match=r"'tiny-clustering' and 'tiny-retrieval'.*task-name"):
        open_checkpoint(str(link))
    assert prompts_of(open_checkpoint(str(link), task_name="clustering")) == TASKS["clustering"]


@pytest.mark.parametrize(
    ("stated", "tasks"),
    [
        ("retrieval", SIDES),
        ("text-matching", TASKS["text-matching"]),
        ("classification", TASKS["classification"]),
        ("legal", {"legal.query": "Query: ", "legal.passage": "Document: "}),
        ("embedding", {"embedding": ""}),
    ],
)
def test_the_operator_s_word_counts_most(
    template: Path, tmp_path: Path, stated: str, tasks: dict[str, str]
) -> None:
    """--task-name replaces what the name says; embedding is one task without a prefix."""
    folder = linked(template, tmp_path / "tiny-clustering")
    assert prompts_of(open_checkpoint(str(folder), task_name=stated)) == tasks


@pytest.mark.parametrize(
    ("prompts", "default", "tasks"),
    [
        (None, None, {"embedding": ""}),
        ({}, None, {"embedding": ""}),
        ({"query": "", "document": ""}, None, {"embedding": ""}),  # sentence-transformers' own
        ({"query": "Instruct: "}, None, {"embedding": ""}),
        ({"passage": "P: "}, "passage", {"embedding": "P: "}),
        ({"query": "Instruct: ", "document": ""}, None,
         {"retrieval.query": "Instruct: ", "retrieval.passage": ""}),
        ({"query": "Q: ", "passage": "P: "}, None,
         {"retrieval.query": "Q: ", "retrieval.passage": "P: "}),
    ],
)  # fmt: skip
def test_prompts_for_both_sides_mean_retrieval(
    template: Path,
    tmp_path: Path,
    prompts: dict[str, str] | None,
    default: str | None,
    tasks: dict[str, str],
) -> None:
    """Without a name, prompts for queries and documents mean retrieval, fewer mean no task."""
    folder = with_prompts(linked(template, tmp_path / "model"), prompts, default)
    assert prompts_of(open_checkpoint(str(folder))) == tasks


@pytest.mark.parametrize(
    ("default", "task"),
    [(None, "passage"), ("document", "passage"), ("query", "query")],
)
def test_the_default_side_is_the_default_prompt_s(
    template: Path, tmp_path: Path, default: str | None, task: str
) -> None:
    """A request without a task embeds passages, unless the checkpoint's default is the query."""
    folder = with_prompts(linked(template, tmp_path / "model"), PROMPTS, default)
    table = task_table(open_checkpoint(str(folder)))
    assert table.default.name == f"retrieval.{task}"
    assert table.get("retrieval").name == "retrieval.passage"


@pytest.mark.parametrize(
    ("name", "stated", "prompts", "needed"),
    [
        ("tiny-retrieval", None, {"document": "D: "}, "'query' and 'document'"),
        ("tiny-clustering", None, {"query": "Q: "}, "'document'"),
        ("tiny", "retrieval", {}, "'query' and 'document'"),
        ("tiny", "clustering", None, "'document'"),
    ],
)
def test_a_task_without_its_prompts_is_refused(  # noqa: PLR0917 - pytest passes them by name
    template: Path,
    tmp_path: Path,
    name: str,
    stated: str | None,
    prompts: dict[str, str] | None,
    needed: str,
) -> None:
    """A task whose prompts the file lacks is rejected with the file and the alternative."""
    folder = with_prompts(linked(template, tmp_path / name), prompts, None)
    with pytest.raises(CheckpointError, match=f"{PROMPTS_FILE} lacks the prompts {needed}") as lack:
        open_checkpoint(str(folder), task_name=stated)
    assert "--task-name embedding" in str(lack.value)
    assert prompts_of(open_checkpoint(str(folder), task_name="embedding")) == {"embedding": ""}


@pytest.mark.parametrize("name", ["retrieval.query", "", "a b", "-x", "é"])
def test_an_impossible_task_name_is_refused(template: Path, name: str) -> None:
    """A name with a dot or a space cannot be a task: clients could not address its sides."""
    with pytest.raises(CheckpointError, match="cannot be the task"):
        open_checkpoint(str(template), task_name=name)


def test_a_checkpoint_with_adapters_needs_no_task_name() -> None:
    """--task-name on a checkpoint with adapters is rejected, because it would have no effect."""
    with pytest.raises(
        CheckpointError, match=r"--task-name clustering .*taskvec-mini has the adap"
    ):
        open_checkpoint("taskvec-mini", task_name="clustering")


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("body", "prompt"),
    [
        ({"input_type": "search_query"}, "Query: "),
        ({"input_type": "query"}, "Query: "),
        ({"input_type": "search_document"}, "Document: "),
        ({"input_type": "document"}, "Document: "),
        ({"task": "retrieval.query"}, "Query: "),
        ({"task": "retrieval.passage"}, "Document: "),
        ({"task": "retrieval"}, "Document: "),
        ({"model": "tiny-retrieval:retrieval.query"}, "Query: "),
        ({}, "Document: "),
    ],
)
async def test_input_type_and_task_choose_the_prefix(
    template: Path, tmp_path: Path, body: dict[str, str], prompt: str
) -> None:
    """Every spelling of a side puts that side's prompt before the text."""
    checkpoint = open_checkpoint(str(linked(template, tmp_path / "tiny-retrieval")))
    engine = FakeEngine(checkpoint.card)
    async with fake_service(checkpoint, engine) as (client, _):
        answer = await client.post("/v1/embeddings", json={"input": TEXTS[:1]} | body)
    (row,) = answer.raise_for_status().json()["data"]
    ids = Tokenizer.from_file(str(checkpoint.tokenizer)).encode(prompt + TEXTS[0]).ids
    truth = hashed_vector(np.array(ids, np.int32), None, checkpoint.card.dimension)
    assert difference(np.array(row["embedding"]), truth / np.linalg.norm(truth)) <= FP32_DIFFERENCE


@pytest.mark.anyio
async def test_an_input_type_that_the_task_has_not_is_refused(
    template: Path, tmp_path: Path
) -> None:
    """A clustering repository answers no search: the error lists its one task."""
    checkpoint = open_checkpoint(str(linked(template, tmp_path / "tiny-clustering")))
    async with fake_service(checkpoint) as (client, _):
        body = {"input": "a", "input_type": "search_query"}
        refused = await client.post("/v1/embeddings", json=body)
        body = {"input": "a", "input_type": "clustering"}
        assert (await client.post("/v1/embeddings", json=body)).status_code == 200
        listed = (await client.get("/v1/models")).json()["data"]
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "unknown_task"
    assert listed[0]["tasks"] == ["clustering"]


@pytest.mark.parametrize(("name", "warns"), [("tiny-retrieval", False), ("tiny", True)])
@pytest.mark.anyio
async def test_a_task_that_only_the_prompts_state_is_logged(
    template: Path, tmp_path: Path, name: str, warns: bool
) -> None:
    """A service that takes the task from the prompts alone says so, and how to state another."""
    checkpoint = open_checkpoint(str(linked(template, tmp_path / name)))
    with capture_logs() as logs:
        async with fake_service(checkpoint):
            pass
    found = [line for line in logs if line["event"] == "task_assumed"]
    assert [line["tasks"] for line in found] == ([list(SIDES)] if warns else [])


def test_check_and_embed_use_the_task(template: Path, tmp_path: Path) -> None:
    """`taskvec check` prints the merged task and its origin; `taskvec embed` applies the prompt."""
    folder = str(linked(template, tmp_path / "model"))
    shown = run("check", folder)
    assert "merged task   retrieval: stated by the prompts in " in shown
    assert "task          retrieval.query: adapter none, prompt 'Query: '" in shown
    shown = run("check", folder, "--task-name", "clustering")
    assert "merged task   clustering: stated by --task-name" in shown
    assert "tasks clustering" in shown.splitlines()[-1]
    with Embedder(folder) as embedder:
        truth = embedder.embed(TEXTS[0], "retrieval.query")
    printed = run("embed", "--model", folder, "--task", "retrieval.query", stdin=TEXTS[0])
    assert difference(np.array(json.loads(printed)["embedding"]), truth[0]) <= 1e-3
    words = run("engine-args", folder, "--cache-dir", str(tmp_path / "cache"))
    assert "--lora-modules" not in words


def test_commands_refuse_an_impossible_task_name(template: Path) -> None:
    """An invalid --task-name exits with 2 and names the option's variable."""
    for command in (["check", str(template)], ["serve", "--model", str(template)]):
        done = subprocess.run(
            [sys.executable, "-m", "taskvec", *command, "--task-name", "retrieval.query"],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert "TASKVEC_TASK_NAME" in done.stderr


@pytest.mark.full("several processes of running servers")
@pytest.mark.parametrize("mode", ["engine process", "gateways", "remote"])
def test_every_way_to_serve_has_the_task(template: Path, tmp_path: Path, mode: str) -> None:
    """One gateway, several, and a gateway before an engine server give the library's vectors."""
    folder = linked(template, tmp_path / "tiny-clustering")
    model = ("--model", str(folder), "--task-name", "retrieval", *EXACT)
    with Embedder(str(folder), task_name="retrieval", dtype="float32") as embedder:
        truth = {task: embedder.embed(TEXTS, task) for task in SIDES}
    with ExitStack() as servers:
        if mode == "remote":
            engine = servers.enter_context(served(*model, "--token-input", "accept"))
            cache = ("--cache-dir", str(tmp_path / "cache"))
            model = (*model, "--engine", "remote", "--engine-url", engine.url, *cache)
        elif mode == "gateways":
            model = (*model, "--workers", "2")
        server = servers.enter_context(served(*model))
        for side, task in (("search_query", "query"), ("search_document", "passage")):
            answer = embed(server.url, {"input": TEXTS, "input_type": side}).json()
            rows = np.array([row["embedding"] for row in answer["data"]])
            assert difference(rows, truth[f"retrieval.{task}"]) <= FP32_DIFFERENCE


def run(*arguments: str, stdin: str = "") -> str:
    """Run `python -m taskvec`, assert success, and return standard output."""
    done = subprocess.run(
        [sys.executable, "-m", "taskvec", *arguments],
        input=stdin, capture_output=True, text=True, check=False, timeout=120, env=os.environ,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def prompts_of(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the tasks of a checkpoint with the prompt of each; none has an adapter."""
    tasks = list(task_table(checkpoint))
    assert {task.adapter for task in tasks} == {None}
    return {task.name: task.prompt for task in tasks}


def linked(source: Path, target: Path) -> Path:
    """Create a checkpoint of links to the files of another."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        (target / file.name).symlink_to(file)
    return target


def with_prompts(folder: Path, prompts: dict[str, str] | None, default: str | None) -> Path:
    """Replace the prompts file; None removes it."""
    (folder / PROMPTS_FILE).unlink()
    if prompts is not None:
        content = {"prompts": prompts, "default_prompt_name": default}
        (folder / PROMPTS_FILE).write_text(json.dumps(content))
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's config.json."""
    value: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
    return value


def difference(first: NDArray[Any], second: Sequence[Any] | NDArray[Any]) -> float:
    """Return the largest difference of two arrays' values."""
    return float(np.abs(first - np.asarray(second)).max())
