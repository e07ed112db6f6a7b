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
from taskvec_train.data.readers import read_labelled, read_pairs, read_scored, read_texts
from taskvec_train.data.records import Labelled
from taskvec_train.files import whole_folder
from taskvec_train.loop import Run, load_weights, train
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
from taskvec_train.sources import (
    GroupSource,
    Mixed,
    Numbers,
    PairSource,
    ScoredSource,
    Source,
    TextSource,
    Vectors,
)
from taskvec_train.stages.distill import FINAL, text_limit
from taskvec_train.stages.negatives import mined
from taskvec_train.student import with_adapter
from taskvec_train.tensors import save_tensors
from taskvec_train.tokens import TokenStore
from taskvec_train.workspace import Workspace


@dataclass(frozen=True)
class Base:
    """What adapters are trained on.

    Attributes:
        checkpoint: the frozen student.
        projection: psi, [teacher, hidden].
        prompts: put before texts for the student.
        instructions: put before them for the teacher.
    """

    checkpoint: Checkpoint
    projection: Tensor
    prompts: Prompts
    instructions: Prompts


def adapt(space: Workspace, task: AnyAdapter, base: Base) -> Path:
    """Train an adapter, or find that it was done; returns the adapter's folder.

    Args:
        space: the run.
        task: what to do.
        base: the frozen student.

    Raises:
        TrainingError: data, disk or recipe refuse; see the message.
    """
    folder = space.folder / "adapt" / task.name
    final = folder / FINAL
    if final.is_dir():
        return final
    backbone = load_backbone(base.checkpoint)
    if task.rope_theta is not None:
        set_rope_theta(backbone, task.rope_theta)
    model = with_adapter(backbone, task.name, task.rank, task.alpha, space.seed)
    objective = _objective(space, task, base, model)
    source = _SOURCES[task.loss](space, task, base)
    kept = int(task.average_with * task.steps) if isinstance(task, RetrievalAdapter) else 0
    run = Run(f"adapt {task.name}", folder, objective, source, task, space.seed, kept_step=kept)
    train(run, space.accelerator)
    if space.accelerator.is_main_process:
        if kept:
            _average(run)
        with whole_folder(final) as unfinished:
            save_adapter(unfinished, model, task, base.prompts)
    space.accelerator.wait_for_everyone()
    return final


def _objective(space: Workspace, task: AnyAdapter, base: Base, model: PeftModel) -> Objective:
    options: dict[str, Any] = {
        "causal": base.checkpoint.backbone.causal,
        "dimensions": space.dimensions,
        "bfloat16": space.bfloat16,
    }
    psi = nn.Parameter(base.projection.clone(), requires_grad=False)
    kind = _OBJECTIVES[task.loss]
    options["weights"] = loss_weights(task)
    for name in ("temperature", "score_temperature"):
        if hasattr(task, name):
            options[name] = getattr(task, name)
    return kind(model, psi, **options)


def loss_weights(task: AnyAdapter) -> dict[str, float]:
    """Each loss of a task's mix with its weight."""
    parts = _OBJECTIVES[task.loss].parts
    return {name: getattr(task, name) for name in parts if hasattr(task, name)}


def _average(run: Run) -> None:
    """The trained weights become the mean of the last and the kept ones."""
    kept = torch.load(run.kept_file, map_location="cpu", weights_only=True)
    last = {name: value.detach().cpu() for name, value in run.trained().items()}
    load_weights(run, {name: (value + kept[name]) / 2 for name, value in last.items()})


def save_adapter(folder: Path, model: PeftModel, task: AnyAdapter, prompts: Prompts) -> None:
    """Write a PEFT adapter, in float32, with its prompts where the service could not know them.

    Args:
        folder: exists.
        model: the LoRA.
        task: what it was trained for.
        prompts: of the checkpoint.
    """
    tensors = get_peft_model_state_dict(model, adapter_name=task.name)
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    save_tensors(tensors, folder / "adapter_model.safetensors")
    config = model.peft_config[task.name]
    config.inference_mode = True
    config.save_pretrained(str(folder))
    # Of all adapters only "retrieval" is known to have two sides.
    named_so = (task.loss == "retrieval") == (task.name == "retrieval")
    if task.prompts is not None or not named_so:
        sides = {"query", "document"} if task.loss == "retrieval" else {"document"}
        own = {"prompts": (task.prompts or prompts).model_dump(include=sides)}
        text = json.dumps(own, indent=2, ensure_ascii=False)
        (folder / PROMPTS_FILE).write_text(text + "\n")


def _pairs(
    space: Workspace,
    task: RetrievalAdapter | TextMatchingAdapter,
    base: Base,
    *,
    query: tuple[str, str],
    hard: int,
) -> PairSource:
    """Pairs as a source; ``query`` is the prompt and the instruction of anchors."""
    pairs = space.read(task.pairs, read_pairs, task.sample)
    prompts = task.prompts or base.prompts
    if isinstance(task, RetrievalAdapter) and task.mine is not None:
        pairs = mined(space, task.mine, pairs, query[1], base.instructions.document)
    rows: dict[tuple[str, str, str], int] = {}

    def row(prompt: str, instruction: str, text: str) -> int:
        return rows.setdefault((prompt, instruction, text), len(rows))

    document = (prompts.document, base.instructions.document)
    places = [(row(*query, pair.anchor), row(*document, pair.positive)) for pair in pairs]
    most = max((len(pair.negatives) for pair in pairs), default=0) if hard else 0
    negatives = np.full((len(pairs), most), -1, dtype=np.int64)
    for i, pair in enumerate(pairs[: len(pairs) if most else 0]):
        given = [row(*document, text) for text in pair.negatives]
        negatives[i, : len(given)] = given
    store = space.tokens(
        [(prompt, text) for prompt, _, text in rows],
        base.checkpoint.tokenizer,
        text_limit(task.max_tokens, base.checkpoint),
    )
    vectors = space.teach([(instruction, text) for _, instruction, text in rows])
    couples = np.array(places, dtype=np.int64)
    return PairSource(
        space.plan(store.lengths[couples].sum(axis=1), items=task.batch),
        f"adapt.{task.name}.pairs",
        store,
        couples,
        negatives=negatives,
        teacher=vectors,
        hard=hard,
        margin=task.margin,
    )


def _retrieval(space: Workspace, task: RetrievalAdapter, base: Base) -> Source:
    prompts = task.prompts or base.prompts
    query = (prompts.query, base.instructions.query)
    return _pairs(space, task, base, query=query, hard=task.hard_negatives)


def _text_matching(space: Workspace, task: TextMatchingAdapter, base: Base) -> Source:
    document = ((task.prompts or base.prompts).document, base.instructions.document)
    sources: list[Source] = []
    if task.pairs:
        sources.append(_pairs(space, task, base, query=document, hard=0))
    if task.scored:
        records = space.read(task.scored, read_scored, task.sample)
        rows = {
            text: i for i, text in enumerate(dict.fromkeys(t for r in records for t in (r.a, r.b)))
        }
        store = _documents(space, task, base, list(rows))
        couples = np.array([(rows[r.a], rows[r.b]) for r in records], dtype=np.int64)
        scores = np.array([r.score for r in records], dtype=np.float32)
        plan = space.plan(store.lengths[couples].sum(axis=1), items=task.batch)
        where = f"adapt.{task.name}.scored"
        sources.append(ScoredSource(plan, where, store, couples, scores))
    return sources[0] if len(sources) == 1 else Mixed(*sources)


def _clustering(space: Workspace, task: ClusteringAdapter, base: Base) -> Source:
    labelled = space.read(task.labelled, read_labelled, task.sample)
    plain = space.read(task.texts, read_texts, task.sample)
    texts = [*(record.text for record in labelled), *plain]
    store = _documents(space, task, base, texts)
    instruction = task.instruction or base.instructions.document
    vectors = space.teach([(instruction, text) for text in texts])
    if task.centroid:
        vectors = _Gathered(vectors, labelled, len(texts), task.centroid)
    plan = space.plan(store.lengths, items=task.batch)
    return TextSource(plan, f"adapt.{task.name}", store, np.arange(len(texts)), vectors)


def _classification(space: Workspace, task: ClassificationAdapter, base: Base) -> Source:
    records = space.read(task.labelled, read_labelled, task.sample)
    if task.sample:  # which may have left one text of a label
        counts = Counter(record.label for record in records)
        records = [record for record in records if counts[record.label] > 1]
    store = _documents(space, task, base, [record.text for record in records])
    plan = space.plan(store.lengths, items=task.batch)
    labels = [record.label for record in records]
    where = f"adapt.{task.name}.labelled, {', '.join(task.labelled)}"
    return GroupSource(plan, where, store, labels, task.negatives)


def _documents(space: Workspace, task: Adapter, base: Base, texts: Sequence[str]) -> TokenStore:
    prompt = (task.prompts or base.prompts).document
    limit = text_limit(task.max_tokens, base.checkpoint)
    return space.tokens([(prompt, text) for text in texts], base.checkpoint.tokenizer, limit)


class _Gathered:
    """The teacher's vectors drawn towards the mean of their label."""

    def __init__(
        self, vectors: Vectors, labelled: Sequence[Labelled], count: int, weight: float
    ) -> None:
        names, labels = np.unique([record.label for record in labelled], return_inverse=True)
        sums = np.zeros((len(names), vectors(np.arange(1)).shape[1]), dtype=np.float64)
        for start in range(0, len(labels), 65_536):
            rows = np.arange(start, min(start + 65_536, len(labels)))
            np.add.at(sums, labels[rows], vectors(rows))
        means = sums / np.linalg.norm(sums, axis=1, keepdims=True).clip(1e-6)
        self._vectors = vectors
        self._labels = np.concatenate([labels, np.full(count - len(labels), -1)])
        # The last row is of the texts without a label.
        self._pull = np.concatenate([means, np.zeros_like(means[:1])]).astype(np.float32) * weight

    def __call__(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> Numbers:
        pulled: Numbers = self._vectors(rows) + self._pull[self._labels[rows]]
        return pulled


_OBJECTIVES: Mapping[str, type[Objective]] = {
    "retrieval": Retrieval,
    "text-matching": TextMatching,
    "clustering": Distillation,
    "classification": Classification,
}
_SOURCES: Mapping[str, Any] = {
    "retrieval": _retrieval,
    "text-matching": _text_matching,
    "clustering": _clustering,
    "classification": _classification,
}
