"""Tiny tasks for MTEB's package, with data of our own instead of its data sets.

Imported by the tests that run them, not while tests are collected: MTEB takes 90 MB.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset, DatasetDict
from mteb.abstasks import AbsTaskClassification, AbsTaskClustering, AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata

from heldout import LABELLED, TOPICS
from taskvec.evaluation.data import PairData, RetrievalData

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
