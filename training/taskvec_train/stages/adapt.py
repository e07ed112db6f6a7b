"""Stage 2: one LoRA adapter for a task, on a frozen student."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.checkpoint.files import PROMPTS_FILE
from taskvec_train.backbones import load_backbone, set_rope_theta
from taskvec_train.batch_sources import (
    BatchSource,
    FloatArray,
    GroupSource,
    InterleavedSource,
    PairSource,
    ScoredSource,
    TextSource,
    VectorLookup,
)
from taskvec_train.context import RunContext
from taskvec_train.data.readers import read_labelled, read_pairs, read_scored, read_texts
from taskvec_train.data.records import Labelled
from taskvec_train.files import atomic_folder
from taskvec_train.loop import Stage, load_weights, train
from taskvec_train.objectives import (
    Classification,
    Distillation,
    Objective,
    Retrieval,
    TextMatching,
)
from taskvec_train.recipe import (
    Adapter,
    AnyAdapter,
    ClassificationAdapter,
    ClusteringAdapter,
    Prompts,
    RetrievalAdapter,
    TextMatchingAdapter,
)
from taskvec_train.stages.distill import FINAL, text_limit
from taskvec_train.stages.negatives import mine_negatives
from taskvec_train.student import with_adapter
from taskvec_train.tensors import save_tensors
from taskvec_train.tokens import TokenStore


@dataclass(frozen=True)
class Base:
    """The frozen student that adapters are trained on.

    Attributes:
        checkpoint: its checkpoint.
        projection: psi, [teacher dimension, hidden].
        prompts: put before texts for the student.
        instructions: put before texts for the teacher.
    """

    checkpoint: Checkpoint
    projection: Tensor
    prompts: Prompts
    instructions: Prompts


def adapt(context: RunContext, task: AnyAdapter, base: Base) -> Path:
    """Train an adapter unless it is trained already; returns the adapter's folder.

    Args:
        context: of the run.
        task: the adapter's recipe.
        base: the frozen student.

    Raises:
        TrainingError: the data or the recipe is invalid, or a file cannot be written.
    """
    folder = context.folder / "adapt" / task.name
    final = folder / FINAL
    if final.is_dir():
        return final
    backbone = load_backbone(base.checkpoint)
    if task.rope_theta is not None:
        set_rope_theta(backbone, task.rope_theta)
    model = with_adapter(backbone, task.name, task.rank, task.alpha, context.seed)
    objective = _objective(context, task, base, model)
    source = _BATCH_SOURCES[task.loss](context, task, base)
    snapshot = int(task.average_with * task.steps) if isinstance(task, RetrievalAdapter) else 0
    stage = Stage(
        f"adapt {task.name}", folder, objective, source, task, context.seed, snapshot_step=snapshot
    )
    train(stage, context.accelerator)
    if context.accelerator.is_main_process:
        if snapshot:
            _average_weights(stage)
        with atomic_folder(final) as unfinished:
            save_adapter(unfinished, model, task, base.prompts)
    context.accelerator.wait_for_everyone()
    return final


def _objective(context: RunContext, task: AnyAdapter, base: Base, model: PeftModel) -> Objective:
    options: dict[str, Any] = {
        "causal": base.checkpoint.backbone.causal,
        "dimensions": context.dimensions,
        "bfloat16": context.bfloat16,
    }
    psi = nn.Parameter(base.projection.clone(), requires_grad=False)
    kind = _OBJECTIVES[task.loss]
    options["weights"] = loss_weights(task)
    for name in ("temperature", "score_temperature"):
        if hasattr(task, name):
            options[name] = getattr(task, name)
    return kind(model, psi, **options)


def loss_weights(task: AnyAdapter) -> dict[str, float]:
    """Return the losses of an adapter and their weights."""
    names = _OBJECTIVES[task.loss].loss_names
    return {name: getattr(task, name) for name in names if hasattr(task, name)}


def _average_weights(stage: Stage) -> None:
    """Replace the trained weights by the mean of the last ones and the snapshot."""
    earlier = torch.load(stage.snapshot_file, map_location="cpu", weights_only=True)
    last = {name: value.detach().cpu() for name, value in stage.trained().items()}
    load_weights(stage, {name: (value + earlier[name]) / 2 for name, value in last.items()})


def save_adapter(folder: Path, model: PeftModel, task: AnyAdapter, prompts: Prompts) -> None:
    """Write a PEFT adapter in float32, with its prompts if the service would choose others.

    Args:
        folder: an existing folder.
        model: the PEFT model.
        task: the adapter's recipe.
        prompts: the checkpoint's prompts.
    """
    tensors = get_peft_model_state_dict(model, adapter_name=task.name)
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    save_tensors(tensors, folder / "adapter_model.safetensors")
    config = model.peft_config[task.name]
    config.inference_mode = True
    config.save_pretrained(str(folder))
    # The service gives a query and a passage task only to an adapter called "retrieval".
    default_sides = (task.loss == "retrieval") == (task.name == "retrieval")
    if task.prompts is not None or not default_sides:
        sides = {"query", "document"} if task.loss == "retrieval" else {"document"}
        own = {"prompts": (task.prompts or prompts).model_dump(include=sides)}
        text = json.dumps(own, indent=2, ensure_ascii=False)
        (folder / PROMPTS_FILE).write_text(text + "\n")


def _pairs(
    context: RunContext,
    task: RetrievalAdapter | TextMatchingAdapter,
    base: Base,
    *,
    query: tuple[str, str],
    hard: int,
) -> PairSource:
    """Return a source of pairs.

    Args:
        context: of the run.
        task: the adapter's recipe.
        base: the frozen student.
        query: prompt and instruction of anchors.
        hard: number of hard negatives drawn for each anchor.
    """
    pairs = context.read(task.pairs, read_pairs, task.sample)
    prompts = task.prompts or base.prompts
    if isinstance(task, RetrievalAdapter) and task.mine is not None:
        pairs = mine_negatives(context, task.mine, pairs, query[1], base.instructions.document)
    rows: dict[tuple[str, str, str], int] = {}

    def row(prompt: str, instruction: str, text: str) -> int:
        return rows.setdefault((prompt, instruction, text), len(rows))

    document = (prompts.document, base.instructions.document)
    pair_rows = [(row(*query, pair.anchor), row(*document, pair.positive)) for pair in pairs]
    max_negatives = max((len(pair.negatives) for pair in pairs), default=0) if hard else 0
    negatives = np.full((len(pairs), max_negatives), -1, dtype=np.int64)
    for i, pair in enumerate(pairs[: len(pairs) if max_negatives else 0]):
        given = [row(*document, text) for text in pair.negatives]
        negatives[i, : len(given)] = given
    store = context.tokens(
        [(prompt, text) for prompt, _, text in rows],
        base.checkpoint.tokenizer,
        text_limit(task.max_tokens, base.checkpoint),
    )
    vectors = context.teacher_vectors([(instruction, text) for _, instruction, text in rows])
    couples = np.array(pair_rows, dtype=np.int64)
    return PairSource(
        context.plan(store.lengths[couples].sum(axis=1), items=task.batch),
        f"adapt.{task.name}.pairs",
        store,
        couples,
        negatives=negatives,
        teacher=vectors,
        hard=hard,
        margin=task.margin,
    )


def _retrieval(context: RunContext, task: RetrievalAdapter, base: Base) -> BatchSource:
    prompts = task.prompts or base.prompts
    query = (prompts.query, base.instructions.query)
    return _pairs(context, task, base, query=query, hard=task.hard_negatives)


def _text_matching(context: RunContext, task: TextMatchingAdapter, base: Base) -> BatchSource:
    document = ((task.prompts or base.prompts).document, base.instructions.document)
    sources: list[BatchSource] = []
    if task.pairs:
        sources.append(_pairs(context, task, base, query=document, hard=0))
    if task.scored:
        records = context.read(task.scored, read_scored, task.sample)
        rows = {
            text: i for i, text in enumerate(dict.fromkeys(t for r in records for t in (r.a, r.b)))
        }
        store = _documents(context, task, base, list(rows))
        couples = np.array([(rows[r.a], rows[r.b]) for r in records], dtype=np.int64)
        scores = np.array([r.score for r in records], dtype=np.float32)
        plan = context.plan(store.lengths[couples].sum(axis=1), items=task.batch)
        where = f"adapt.{task.name}.scored"
        sources.append(ScoredSource(plan, where, store, couples, scores))
    return sources[0] if len(sources) == 1 else InterleavedSource(*sources)


def _clustering(context: RunContext, task: ClusteringAdapter, base: Base) -> BatchSource:
    labelled = context.read(task.labelled, read_labelled, task.sample)
    plain = context.read(task.texts, read_texts, task.sample)
    texts = [*(record.text for record in labelled), *plain]
    store = _documents(context, task, base, texts)
    instruction = task.instruction or base.instructions.document
    vectors = context.teacher_vectors([(instruction, text) for text in texts])
    if task.centroid:
        vectors = _CentroidLookup(vectors, labelled, len(texts), task.centroid)
    plan = context.plan(store.lengths, items=task.batch)
    return TextSource(plan, f"adapt.{task.name}", store, np.arange(len(texts)), vectors)


def _classification(context: RunContext, task: ClassificationAdapter, base: Base) -> BatchSource:
    records = context.read(task.labelled, read_labelled, task.sample)
    if task.sample:  # a sample may have only one text of a label
        counts = Counter(record.label for record in records)
        records = [record for record in records if counts[record.label] > 1]
    store = _documents(context, task, base, [record.text for record in records])
    plan = context.plan(store.lengths, items=task.batch)
    labels = [record.label for record in records]
    where = f"adapt.{task.name}.labelled, {', '.join(task.labelled)}"
    return GroupSource(plan, where, store, labels, task.negatives)


def _documents(context: RunContext, task: Adapter, base: Base, texts: Sequence[str]) -> TokenStore:
    prompt = (task.prompts or base.prompts).document
    limit = text_limit(task.max_tokens, base.checkpoint)
    return context.tokens([(prompt, text) for text in texts], base.checkpoint.tokenizer, limit)


class _CentroidLookup:
    """Lookup of the teacher's vectors, moved towards the mean of their label."""

    def __init__(
        self, vectors: VectorLookup, labelled: Sequence[Labelled], count: int, weight: float
    ) -> None:
        names, labels = np.unique([record.label for record in labelled], return_inverse=True)
        sums = np.zeros((len(names), vectors(np.arange(1)).shape[1]), dtype=np.float64)
        for start in range(0, len(labels), 65_536):
            rows = np.arange(start, min(start + 65_536, len(labels)))
            np.add.at(sums, labels[rows], vectors(rows))
        means = sums / np.linalg.norm(sums, axis=1, keepdims=True).clip(1e-6)
        self._vectors = vectors
        self._labels = np.concatenate([labels, np.full(count - len(labels), -1)])
        # The last row is for texts without a label.
        self._shift = np.concatenate([means, np.zeros_like(means[:1])]).astype(np.float32) * weight

    def __call__(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> FloatArray:
        shifted: FloatArray = self._vectors(rows) + self._shift[self._labels[rows]]
        return shifted


_OBJECTIVES: Mapping[str, type[Objective]] = {
    "retrieval": Retrieval,
    "text-matching": TextMatching,
    "clustering": Distillation,
    "classification": Classification,
}
_BATCH_SOURCES: Mapping[str, Any] = {
    "retrieval": _retrieval,
    "text-matching": _text_matching,
    "clustering": _clustering,
    "classification": _classification,
}
