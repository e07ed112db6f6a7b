"""MTEB's own package on a real service, with tiny tasks of our own instead of its data."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from heldout import write_all
from taskvec.core.output_format import OutputFormat, OutputType
from taskvec.errors import InvalidRequestError
from taskvec.evaluation.data import find_data
from taskvec.evaluation.run import Plan, evaluate
from taskvec.evaluation.service import ServedModel


@pytest.fixture(scope="module")
def tiny() -> ModuleType:
    """The tasks; MTEB is imported here, not where tests are collected."""
    return importlib.import_module("mtebtasks")


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """The module under test."""
    return importlib.import_module("taskvec.evaluation.benchmark")


@pytest.fixture(scope="module")
def service(server_url: str) -> ServedModel:
    """Return the model of a real service."""
    return ServedModel(server_url)


@pytest.fixture
def searches(tiny: ModuleType, tmp_path: Path) -> Iterator[tuple[Any, Any]]:
    """Return two tasks made of the tests' own data."""
    root = write_all(tmp_path / "data")
    pairs, search = find_data([root / "pairs.jsonl", root / "search"])
    tiny.TinySearch.data, tiny.TinyPairs.data = search, pairs
    yield tiny.TinySearch(), tiny.TinyPairs()
    del tiny.TinySearch.data, tiny.TinyPairs.data


def test_mteb_agrees_with_our_measures(
    service: ServedModel,
    searches: tuple[Any, Any],
    tiny: ModuleType,
    benchmark: ModuleType,
    tmp_path: Path,
) -> None:
    """MTEB's nDCG@10, recall@10 and Spearman equal ours, with the adapters chosen by type."""
    output_format = OutputFormat(256, (OutputType.FLOAT,))
    result = benchmark.run_benchmark(
        benchmark.MtebEncoder(service, output_format), searches, tmp_path / "results"
    )
    theirs = {task.task_name: task.scores["test"][0] for task in result.task_results}
    ours = {
        row.kind: row.score.measures
        for row in evaluate(
            service, Plan(data=[tiny.TinySearch.data], formats=[output_format], tasks=["retrieval"])
        )
    } | {
        row.kind: row.score.measures
        for row in evaluate(
            service,
            Plan(data=[tiny.TinyPairs.data], formats=[output_format], tasks=["text-matching"]),
        )
    }
    near = {"abs": 2e-3}  # a vector may differ a little between batches
    search, pairs = theirs["TinySearch"], theirs["TinyPairs"]
    assert search["ndcg_at_10"] == pytest.approx(ours["retrieval"]["ndcg@10"], **near)
    assert search["recall_at_10"] == pytest.approx(ours["retrieval"]["recall@10"], **near)
    assert pairs["cosine_spearman"] == pytest.approx(ours["sts"]["spearman"], **near)


def test_every_type_of_task_runs(
    service: ServedModel, tiny: ModuleType, benchmark: ModuleType, tmp_path: Path
) -> None:
    """Classification and clustering run with any output type, and their results are stored."""
    encoder = benchmark.MtebEncoder(service, OutputFormat(128, (OutputType.BINARY,)))
    tasks = [tiny.TinyTopics(), tiny.TinyGroups()]
    result = benchmark.run_benchmark(encoder, tasks, tmp_path)
    scores = {task.task_name: task.get_score() for task in result.task_results}
    assert scores["TinyTopics"] > 0.5
    assert 0 <= scores["TinyGroups"] <= 1
    assert benchmark.benchmark_table(tasks, result).row_count == 2
    assert len(list(tmp_path.rglob("Tiny*.json"))) == 2


@pytest.mark.parametrize(
    ("kind", "adapter"),
    [
        ("Retrieval", "retrieval"),
        ("Reranking", "retrieval"),
        ("STS", "text-matching"),
        ("BitextMining", "text-matching"),
        ("PairClassification", "text-matching"),
        ("Clustering", "clustering"),
        ("MultilabelClassification", "classification"),
    ],
)
def test_types_of_task_have_their_adapter(
    service: ServedModel, benchmark: ModuleType, kind: str, adapter: str
) -> None:
    """Each type of task gets its adapter, unless one adapter is given for all."""
    output_format = OutputFormat(256, (OutputType.FLOAT,))
    assert benchmark.MtebEncoder(service, output_format).adapter_for(kind) == adapter
    assert (
        benchmark.MtebEncoder(service, output_format, "clustering").adapter_for(kind)
        == "clustering"
    )


def test_an_unknown_adapter_is_refused(service: ServedModel, benchmark: ModuleType) -> None:
    """An unknown adapter is refused with a list of the model's adapters."""
    with pytest.raises(InvalidRequestError, match="has no task 'poetry': choose from "):
        benchmark.MtebEncoder(service, OutputFormat(256, (OutputType.FLOAT,)), "poetry")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "set --tasks or --benchmark"),
        (("--tasks", "STS1222"), "MTEB: 'STS1222' not found"),
        (("--benchmark", "MTEB(klingon)"), "MTEB: "),
    ],
    ids=["nothing", "task", "benchmark"],
)
def test_unknown_names_are_refused(
    server_url: str, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    """A name that MTEB does not know gives a one-sentence error and exit code 2."""
    command = [sys.executable, "-m", "taskvec", "eval-mteb", "--url", server_url, *options]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 2, done.stderr
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
