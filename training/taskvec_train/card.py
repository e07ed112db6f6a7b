"""Write the model card of a checkpoint: architecture, data, training, results, hashes."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import version
from pathlib import Path

from taskvec.checkpoint.backbone import Backbone
from taskvec_train.metrics import read_metrics
from taskvec_train.recipe import Recipe

DATA = "DATA.md"
"""File name of the corpus's data card in a checkpoint's folder."""

_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "numpy")


def model_card(recipe: Recipe, shape: Backbone, folder: Path, *, run: Path, figures: str) -> str:
    """Return the README.md of a checkpoint.

    Args:
        recipe: the recipe of the run.
        shape: the backbone.
        folder: of the checkpoint, with its weights already written.
        run: folder of the run, whose metrics are summarised.
        figures: Markdown with evaluation results; empty to leave that section out.
    """
    head = f"license: {recipe.export.licence}\nlanguage: {recipe.export.language}"
    stages = [("distill", phase.name) for phase in recipe.distill]
    stages += [("adapt", task.name) for task in recipe.adapt]
    versions = [f"Python {platform.python_version()}"]
    versions += [f"{name} {version(name)}" for name in _LIBRARIES]
    parts = [
        f"---\n{head}\npipeline_tag: feature-extraction\n---",
        f"# {recipe.name}",
        recipe.export.summary,
        _shape(recipe, shape),
        f"## Data\n{recipe.export.data}",
        f"What it is made of: [the data card]({DATA})." if (folder / DATA).is_file() else "",
        f"## Training\nTeacher: {recipe.teacher.model}.\nSeed: {recipe.seed}.",
        f"Made with {', '.join(versions)}.",
        "| stage | steps | tokens | first loss | last loss |\n|---|---|---|---|---|",
        *(_stage(run / kind / name, f"{kind} {name}") for kind, name in stages),
        f"\n## Figures\n{figures.strip()}" if figures.strip() else "",
        f"\n## Recipe\n```text\n{recipe.model_dump_json(indent=1, exclude={'export'})}\n```",
        "## Weights\n| file | sha256 |\n|---|---|",
        *(_hash(file, folder) for file in sorted(folder.rglob("*.safetensors"))),
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _shape(recipe: Recipe, shape: Backbone) -> str:
    prompts = recipe.prompts
    size = f"{shape.layers} layers, {shape.hidden} wide, {shape.parameters:,} parameters"
    lines = [
        f"Backbone: {shape.architecture}, {size}, {recipe.export.dtype}.",
        "The last token's state is the vector.",
        f"Matryoshka dimensions: {', '.join(map(str, recipe.dimensions))}.",
        f"Prompts: `{prompts.query}` for queries, `{prompts.document}` for all other texts.",
        *(f"Adapter `{task.name}`: loss {task.loss}, rank {task.rank}." for task in recipe.adapt),
    ]
    return "\n".join(f"* {line}" for line in lines)


def _stage(folder: Path, name: str) -> str:
    rows = read_metrics(folder)
    if not rows:
        return f"| {name} | - | - | - | - |"
    tokens = sum(row["tokens"] for row in rows)
    first, last = rows[0]["loss"], rows[-1]["loss"]
    return f"| {name} | {rows[-1]['step']:,.0f} | {tokens:,.0f} | {first:.4f} | {last:.4f} |"


def _hash(file: Path, folder: Path) -> str:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return f"| {file.relative_to(folder)} | {digest} |"
