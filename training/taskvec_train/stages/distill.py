"""Stage 1: distil the teacher into the student, through a projection that is trained as well."""

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
from taskvec_train.batch_sources import TextSource, VectorLookup
from taskvec_train.batches import split_by_tokens
from taskvec_train.context import RunContext
from taskvec_train.data.readers import read_pairs, read_texts
from taskvec_train.data.records import DataError
from taskvec_train.files import atomic_folder
from taskvec_train.loop import Stage, train
from taskvec_train.objectives import Distillation
from taskvec_train.recipe import Phase, Prompts, Teacher
from taskvec_train.student import save_student
from taskvec_train.tokens import TokenStore

FINAL = "final"
"""Folder with the result of a stage; it exists once the stage is done."""

_HELD_OUT_TOKENS = 16_384


def distill(
    context: RunContext,
    phase: Phase,
    start: Path,
    prompts: Prompts,
    teacher: Teacher,
) -> Path:
    """Train a phase unless it is done already; returns the folder of its student.

    Args:
        context: of the run.
        phase: the phase's recipe.
        start: folder of the student to start from, with projection.safetensors.
        prompts: put before texts for the student.
        teacher: its instructions are put before texts for the teacher.

    Raises:
        TrainingError: the data or the recipe is invalid, or a file cannot be written.
    """
    folder = context.folder / "distill" / phase.name
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
        dimensions=context.dimensions,
        weights={"distill": phase.distill, "similarity": phase.similarity},
        bfloat16=context.bfloat16,
    )
    source = _source(context, phase, base, prompts, teacher)
    validate = None
    if phase.held_out:
        held_out = _held_out(context, phase, base, prompts, teacher)
        validate = partial(held_out_cosines, objective, *held_out, context.dimensions)
    stage = Stage(f"distill {phase.name}", folder, objective, source, phase, context.seed, validate)
    train(stage, context.accelerator)
    if context.accelerator.is_main_process:
        with atomic_folder(final) as unfinished:
            save_student(unfinished, model, projection.detach().cpu(), base.tokenizer)
    context.accelerator.wait_for_everyone()
    return final


def _source(
    context: RunContext, phase: Phase, base: Checkpoint, prompts: Prompts, teacher: Teacher
) -> TextSource:
    pairs = context.read(phase.pairs, read_pairs, phase.sample)
    texts = context.read(phase.texts, read_texts, phase.sample)
    documents = dict.fromkeys([*texts, *(pair.positive for pair in pairs)])
    queries = dict.fromkeys(pair.anchor for pair in pairs)
    sides = (
        (documents, prompts.document, teacher.document_instruction),
        (queries, prompts.query, teacher.query_instruction),
    )
    where = f"distill.{phase.name}"
    prompted = [(prompt, text) for side, prompt, _ in sides for text in side]
    store = context.tokens(prompted, base.tokenizer, text_limit(phase.max_tokens, base))
    chosen = np.flatnonzero(store.lengths >= phase.min_tokens)
    if not len(chosen):
        raise DataError(
            f"{where}: none of {len(store)} texts has {phase.min_tokens} tokens: lower min_tokens, "
            "or add longer texts."
        )
    instructed = [(instruction, text) for side, _, instruction in sides for text in side]
    vectors = context.teacher_vectors([instructed[i] for i in chosen])
    plan = context.plan(store.lengths[chosen], tokens=phase.batch_tokens)
    return TextSource(plan, where, store, chosen, vectors)


def text_limit(max_tokens: int, base: Checkpoint) -> int:
    """Return the maximum number of tokens of a text, at most the positions of the base."""
    return min(max_tokens, base.backbone.max_positions)


def held_out_cosines(
    objective: Distillation, store: TokenStore, teacher: VectorLookup, dimensions: Sequence[int]
) -> dict[str, float]:
    """Return the mean cosine of psi z and the teacher's vector, z truncated to each dimension."""
    rows = np.argsort(store.lengths, kind="stable")
    device = objective.projection.device
    sums = dict.fromkeys(dimensions, 0.0)
    with torch.no_grad():
        for batch in split_by_tokens(rows, store.lengths, _HELD_OUT_TOKENS):
            ids, lengths = (torch.from_numpy(array).to(device) for array in store.padded(batch))
            z, given = objective.embed(ids, lengths), torch.from_numpy(teacher(batch)).to(device)
            for d in dimensions:
                projected = z[:, :d] @ objective.projection[:, :d].T
                sums[d] += functional.cosine_similarity(projected, given).sum().item()
    return {f"held_out_cosine_{d}": total / len(rows) for d, total in sums.items()}


def _held_out(
    context: RunContext, phase: Phase, base: Checkpoint, prompts: Prompts, teacher: Teacher
) -> tuple[TokenStore, VectorLookup]:
    texts = list(dict.fromkeys(context.read(phase.held_out, read_texts)))
    prompted = [(prompts.document, text) for text in texts]
    store = context.tokens(prompted, base.tokenizer, text_limit(phase.max_tokens, base))
    vectors = context.teacher_vectors([(teacher.document_instruction, text) for text in texts])
    return store, vectors
