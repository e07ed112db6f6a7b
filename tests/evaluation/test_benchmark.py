"""MTEB's own package on a real service, with tiny tasks of our own instead of its data."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from mteb.abstasks import AbsTaskClassification, AbsTaskClustering, AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata

from heldout import LABELLED, TOPICS, write_all
from taskvec.core.output_format import OutputFormat, OutputType
from taskvec.errors import InvalidRequestError
from taskvec.evaluation.benchmark import MtebEncoder, benchmark_table, run_benchmark
from taskvec.evaluation.data import PairData, RetrievalData, find_data
from taskvec.evaluation.run import Plan, evaluate
from taskvec.evaluation.service import ServedModel

TEXTS, LABELS = (list(column) for column in zip(*LABELLED, strict=True))


def about(name: str, kind: Any, measure: str) -> TaskMetadata:
    """Return the metadata of a task for MTEB."""
    return TaskMetadata(
        name=name,
        description="Tiny texts of three topics.",
        dataset={"path": "taskvec/tiny", "revision": "1"},
        type=kind,
        category="t2t",
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score=measure,
    )


class TinySearch(AbsTaskRetrieval):
    """Queries and documents of the tests' own data."""

    metadata = about("TinySearch", "Retrieval", "ndcg_at_10")
    data: RetrievalData

    def load_data(self, *_: Any, **__: Any) -> None:
        """Convert the data to MTEB's columns."""
        documents = [
            {"id": f"d{i}", "title": "", "text": text} for i, text in enumerate(self.data.documents)
        ]
        queries = [{"id": f"q{i}", "text": text} for i, text in enumerate(self.data.queries)]
        relevant = {
            f"q{i}": {f"d{document}": grade for document, grade in grades.items()}
            for i, grades in enumerate(self.data.qrels)
        }
        split = {
            "corpus": Dataset.from_list(documents),
            "queries": Dataset.from_list(queries),
            "relevant_docs": relevant,
            "top_ranked": None,
        }
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


class TinyPairs(AbsTaskSTS):
    """Pairs of the tests' own data."""

    metadata = about("TinyPairs", "STS", "cosine_spearman")
    min_score, max_score = 0, 7
    data: PairData

    def load_data(self, *_: Any, **__: Any) -> None:
        """Convert the data to MTEB's columns."""
        columns = {
            "sentence1": self.data.left, "sentence2": self.data.right, "score": self.data.scores,
        }  # fmt: skip
        self.dataset = DatasetDict({"test": Dataset.from_dict(columns)})
        self.data_loaded = True


class TinyTopics(AbsTaskClassification):
    """Classification by topic."""

    metadata = about("TinyTopics", "Classification", "accuracy")
    samples_per_label = 4

    def load_data(self, *_: Any, **__: Any) -> None:
        """Convert the data to MTEB's columns."""
        numbers = [list(TOPICS).index(label) for label in LABELS]
        self.dataset = DatasetDict(
            {
                "train": Dataset.from_dict({"text": TEXTS[:24], "label": numbers[:24]}),
                "test": Dataset.from_dict({"text": TEXTS[24:], "label": numbers[24:]}),
            }
        )
        self.data_loaded = True


class TinyGroups(AbsTaskClustering):
    """Clustering by topic."""

    metadata = about("TinyGroups", "Clustering", "v_measure")
    max_fraction_of_documents_to_embed = 1.0

    def load_data(self, *_: Any, **__: Any) -> None:
        """Convert the data to MTEB's columns."""
        columns = {"sentences": TEXTS, "labels": LABELS}
        self.dataset = DatasetDict({"test": Dataset.from_dict(columns)})
        self.data_loaded = True


@pytest.fixture(scope="module")
def service(server_url: str) -> ServedModel:
    """Return the model of a real service."""
    return ServedModel(server_url)


@pytest.fixture
def searches(tmp_path: Path) -> Iterator[tuple[TinySearch, TinyPairs]]:
    """Return two tasks made of the tests' own data."""
    root = write_all(tmp_path / "data")
    pairs, search = find_data([root / "pairs.jsonl", root / "search"])
    TinySearch.data, TinyPairs.data = search, pairs
    yield TinySearch(), TinyPairs()
    del TinySearch.data, TinyPairs.data


def test_mteb_agrees_with_our_measures(
    service: ServedModel, searches: tuple[TinySearch, TinyPairs], tmp_path: Path
) -> None:
    """MTEB's nDCG@10, recall@10 and Spearman equal ours, with the adapters chosen by type."""
    output_format = OutputFormat(256, (OutputType.FLOAT,))
    result = run_benchmark(MtebEncoder(service, output_format), searches, tmp_path / "results")
    theirs = {task.task_name: task.scores["test"][0] for task in result.task_results}
    ours = {
        row.kind: row.score.measures
        for row in evaluate(
            service, Plan(data=[TinySearch.data], formats=[output_format], tasks=["retrieval"])
        )
    } | {
        row.kind: row.score.measures
        for row in evaluate(
            service, Plan(data=[TinyPairs.data], formats=[output_format], tasks=["text-matching"])
        )
    }
    near = {"abs": 2e-3}  # a vector may differ a little between batches
    search, pairs = theirs["TinySearch"], theirs["TinyPairs"]
    assert search["ndcg_at_10"] == pytest.approx(ours["retrieval"]["ndcg@10"], **near)
    assert search["recall_at_10"] == pytest.approx(ours["retrieval"]["recall@10"], **near)
    assert pairs["cosine_spearman"] == pytest.approx(ours["sts"]["spearman"], **near)


def test_every_type_of_task_runs(service: ServedModel, tmp_path: Path) -> None:
    """Classification and clustering run with any output type, and their results are stored."""
    encoder = MtebEncoder(service, OutputFormat(128, (OutputType.BINARY,)))
    tasks = [TinyTopics(), TinyGroups()]
    result = run_benchmark(encoder, tasks, tmp_path)
    scores = {task.task_name: task.get_score() for task in result.task_results}
    assert scores["TinyTopics"] > 0.5
    assert 0 <= scores["TinyGroups"] <= 1
    assert benchmark_table(tasks, result).row_count == 2
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
def test_types_of_task_have_their_adapter(service: ServedModel, kind: str, adapter: str) -> None:
    """Each type of task gets its adapter, unless one adapter is given for all."""
    output_format = OutputFormat(256, (OutputType.FLOAT,))
    assert MtebEncoder(service, output_format).adapter_for(kind) == adapter
    assert MtebEncoder(service, output_format, "clustering").adapter_for(kind) == "clustering"


def test_an_unknown_adapter_is_refused(service: ServedModel) -> None:
    """An unknown adapter is refused with a list of the model's adapters."""
    with pytest.raises(InvalidRequestError, match="has no task 'poetry': choose from "):
        MtebEncoder(service, OutputFormat(256, (OutputType.FLOAT,)), "poetry")


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
