"""Stage 1: the whole student follows the teacher through a projection that learns with it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec_train.backbones import load_backbone, open_base, set_rope_theta
from taskvec_train.batches import cut_by_tokens
from taskvec_train.data.readers import read_pairs, read_texts
from taskvec_train.data.records import DataError
from taskvec_train.files import whole_folder
from taskvec_train.loop import Run, train
from taskvec_train.objectives import Distillation
from taskvec_train.recipe import Phase, Prompts, Teacher
from taskvec_train.sources import TextSource, Vectors
from taskvec_train.student import save_student
from taskvec_train.tokens import TokenStore
from taskvec_train.workspace import Workspace

FINAL = "final"
"""Folder of what a stage made; there when it is done."""

_HELD_OUT_TOKENS = 16_384


def distill(
    space: Workspace,
    phase: Phase,
    start: Path,
    prompts: Prompts,
    teacher: Teacher,
) -> Path:
    """Train a phase, or find that it was done; returns the folder of the student it made.

    Args:
        space: the run.
        phase: what to do.
        start: a student with projection.safetensors.
        prompts: put before texts for the student.
        teacher: whose instructions are put before them for the teacher.

    Raises:
        TrainingError: data, disk or recipe refuse; see the message.
    """
    folder = space.folder / "distill" / phase.name
    final = folder / FINAL
    if final.is_dir():
        return final
    base = open_base(start)
    model = load_backbone(base)
    if phase.rope_theta is not None:
        set_rope_theta(model, phase.rope_theta)
    projection = nn.Parameter(load_file(start / "projection.safetensors")["psi"])
    objective = Distillation(
        model,
        projection,
        causal=base.backbone.causal,
        dimensions=space.dimensions,
        weights={"distill": phase.distill, "similarity": phase.similarity},
        bfloat16=space.bfloat16,
    )
    source = _source(space, phase, base, prompts, teacher)
    measure = None
    if phase.held_out:
        unseen = _held_out(space, phase, base, prompts, teacher)
        measure = partial(held_out_cosines, objective, *unseen, space.dimensions)
    run = Run(f"distill {phase.name}", folder, objective, source, phase, space.seed, measure)
    train(run, space.accelerator)
    if space.accelerator.is_main_process:
        with whole_folder(final) as unfinished:
            save_student(unfinished, model, projection.detach().cpu(), base.tokenizer)
    space.accelerator.wait_for_everyone()
    return final


def _source(
    space: Workspace, phase: Phase, base: Checkpoint, prompts: Prompts, teacher: Teacher
) -> TextSource:
    pairs = space.read(phase.pairs, read_pairs, phase.sample)
    texts = space.read(phase.texts, read_texts, phase.sample)
    documents = dict.fromkeys([*texts, *(pair.positive for pair in pairs)])
    queries = dict.fromkeys(pair.anchor for pair in pairs)
    sides = (
        (documents, prompts.document, teacher.document_instruction),
        (queries, prompts.query, teacher.query_instruction),
    )
    where = f"distill.{phase.name}"
    prompted = [(prompt, text) for side, prompt, _ in sides for text in side]
    store = space.tokens(prompted, base.tokenizer, text_limit(phase.max_tokens, base))
    chosen = np.flatnonzero(store.lengths >= phase.min_tokens)
    if not len(chosen):
        raise DataError(
            f"{where}: none of {len(store)} texts has {phase.min_tokens} tokens: lower min_tokens, "
            "or name longer texts."
        )
    asked = [(instruction, text) for side, _, instruction in sides for text in side]
    vectors = space.teach([asked[i] for i in chosen])
    plan = space.plan(store.lengths[chosen], tokens=phase.batch_tokens)
    return TextSource(plan, where, store, chosen, vectors)


def text_limit(asked: int, base: Checkpoint) -> int:
    """Most tokens of a text: no more than the base has positions."""
    return min(asked, base.backbone.max_positions)


def held_out_cosines(
    objective: Distillation, store: TokenStore, teacher: Vectors, dimensions: Sequence[int]
) -> dict[str, float]:
    """Mean cosine of psi z to the teacher's vector, whole and cut to each dimension."""
    rows = np.argsort(store.lengths, kind="stable")
    device = objective.projection.device
    sums = dict.fromkeys(dimensions, 0.0)
    with torch.no_grad():
        for batch in cut_by_tokens(rows, store.lengths, _HELD_OUT_TOKENS):
            ids, lengths = (torch.from_numpy(part).to(device) for part in store.padded(batch))
            z, given = objective.embed(ids, lengths), torch.from_numpy(teacher(batch)).to(device)
            for d in dimensions:
                projected = z[:, :d] @ objective.projection[:, :d].T
                sums[d] += functional.cosine_similarity(projected, given).sum().item()
    return {f"held_out_cosine_{d}": total / len(rows) for d, total in sums.items()}


def _held_out(
    space: Workspace, phase: Phase, base: Checkpoint, prompts: Prompts, teacher: Teacher
) -> tuple[TokenStore, Vectors]:
    texts = list(dict.fromkeys(space.read(phase.held_out, read_texts)))
    prompted = [(prompts.document, text) for text in texts]
    store = space.tokens(prompted, base.tokenizer, text_limit(phase.max_tokens, base))
    vectors = space.teach([(teacher.document_instruction, text) for text in texts])
    return store, vectors
