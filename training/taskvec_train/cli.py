"""Command line: corpus, run, distill, measure, ablate, export, adapter, teach, mine."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Any

import typer

from taskvec.malloc import TRAINING, tune_malloc
from taskvec_train.data.commands import corpus, mine
from taskvec_train.errors import TrainingError
from taskvec_train.exit import exit_on_error
from taskvec_train.files import atomic_file

app = typer.Typer(
    help="Train embedding models and their task adapters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeArgument = Annotated[Path, typer.Argument(help="A recipe's TOML file.")]
DataOption = Annotated[Path, typer.Option(help="Folder that the recipe's paths are relative to.")]
OutOption = Annotated[Path, typer.Option(help="Folder of the run; the same command resumes it.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="key=value that overrides the recipe, e.g. distill.0.steps=10."),
]
CpuOption = Annotated[bool, typer.Option("--cpu", help="Do not use a GPU.")]


class Loss(enum.StrEnum):
    """The kinds of adapter, each with its own losses."""

    RETRIEVAL = "retrieval"
    TEXT_MATCHING = "text-matching"
    CLUSTERING = "clustering"
    CLASSIFICATION = "classification"


def main() -> None:
    """Run the command line."""
    tune_malloc(TRAINING)
    app()


app.command()(corpus)
app.command()(mine)


@app.command()
def run(
    recipe: RecipeArgument,
    data: DataOption,
    out: OutOption,
    changes: SetOption = None,
    cpu: CpuOption = False,
) -> None:
    """Run all stages of a recipe, from the teacher's vectors to the checkpoint.

    On several GPUs: torchrun --nproc-per-node N -m taskvec_train run ...
    """
    with exit_on_error():
        from taskvec_train.recipe import read_recipe  # noqa: PLC0415 - imports torch, after the check of extras
        from taskvec_train.run import run_recipe  # noqa: PLC0415

        folder = run_recipe(read_recipe(recipe, changes or ()), data, out, cpu=cpu)
        typer.echo(f"Wrote {folder}. Serve it: taskvec serve --model {folder}")


@app.command()
def distill(
    recipe: RecipeArgument,
    data: DataOption,
    out: OutOption,
    changes: SetOption = None,
    cpu: CpuOption = False,
) -> None:
    """Run only stage 1 of a recipe, distillation; `run` continues from it."""
    with exit_on_error():
        from taskvec_train.recipe import read_recipe  # noqa: PLC0415
        from taskvec_train.run import distill_recipe, open_run  # noqa: PLC0415

        read = read_recipe(recipe, changes or ())
        student, _ = distill_recipe(open_run(read, data, out, cpu=cpu), read)
        typer.echo(f"Wrote {student}.")


@app.command()
def export(
    recipe: RecipeArgument,
    data: DataOption,
    out: OutOption,
    figures: Annotated[
        Path | None, typer.Option(help="Markdown file with results for the model card.")
    ] = None,
    changes: SetOption = None,
) -> None:
    """Write the checkpoint of a finished run again, with results in its model card."""
    with exit_on_error():
        from taskvec_train.recipe import read_recipe  # noqa: PLC0415
        from taskvec_train.run import run_recipe  # noqa: PLC0415

        measured = _read_text(figures) if figures else ""
        read = read_recipe(recipe, changes or ())
        folder = run_recipe(read, data, out, cpu=True, figures=measured, train=False)
        typer.echo(f"Wrote {folder}.")


@app.command()
def measure(
    recipe: RecipeArgument,
    out: OutOption,
    held_out: Annotated[
        Path, typer.Option(help="Evaluation data, in a layout that `taskvec eval` reads.")
    ],
    beside: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=MODEL: another checkpoint to compare with; may be given several times."
        ),
    ] = None,
    changes: SetOption = None,
    cpu: CpuOption = False,
) -> None:
    """Evaluate a finished run, its teacher, its untrained student and BM25.

    Writes figures.json and figures.md into the run's folder, again after each model; the latter is
    for `export --figures`.
    """
    with exit_on_error("eval"):
        from taskvec.evaluation.report import progress_bar  # noqa: PLC0415 - an extra
        from taskvec_train.measure import measure  # noqa: PLC0415
        from taskvec_train.recipe import read_recipe  # noqa: PLC0415
        from taskvec_train.results import ModelResult, as_json, as_markdown  # noqa: PLC0415

        others = dict(_parse_named_model(text) for text in beside or ())
        read = read_recipe(recipe, changes or ())
        results: list[ModelResult] = []
        with progress_bar() as progress:
            for model_results in measure(read, out, held_out, others, cpu=cpu, progress=progress):
                results += model_results
                tables = as_markdown(results, read.name)
                _write_results(out / "figures", as_json(results), tables)
        typer.echo(tables)


@app.command()
def ablate(
    recipe: RecipeArgument,
    data: DataOption,
    out: OutOption,
    held_out: Annotated[
        Path, typer.Option(help="Evaluation data, in a layout that `taskvec eval` reads.")
    ],
    adapter: Annotated[
        str, typer.Option(help="Name of one of the recipe's adapters.")
    ] = "retrieval",
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each variant.")] = 3,
    changes: SetOption = None,
    cpu: CpuOption = False,
) -> None:
    """Train an adapter without each of its losses in turn, and evaluate the variants.

    Uses the run's student. Writes ablation.json and ablation.md into the run's folder.
    """
    with exit_on_error("eval"):
        from taskvec.evaluation.report import progress_bar  # noqa: PLC0415 - an extra
        from taskvec_train.ablation import ablate, as_markdown, variants_of  # noqa: PLC0415
        from taskvec_train.recipe import read_recipe  # noqa: PLC0415
        from taskvec_train.results import as_json  # noqa: PLC0415

        read = read_recipe(recipe, changes or ())
        variants = variants_of(read, adapter, seeds)
        with progress_bar() as progress:
            results = ablate(
                read, variants, data=data, folder=out, held_out=held_out, cpu=cpu, progress=progress
            )
        tables = as_markdown(results)
        _write_results(out / "ablation", as_json(results), tables)
        typer.echo(tables)


@app.command()
def adapter(
    base: Annotated[str, typer.Option(help="The model: a folder, a hub id, or taskvec-mini.")],
    task: Annotated[str, typer.Option(help="Name of the new task, and of its folder.")],
    loss: Annotated[Loss, typer.Option(help="Kind of the task.")],
    data: Annotated[list[Path], typer.Option(help="JSONL or Parquet, a file or a folder.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for a copy of the model; default: the model's own.")
    ] = None,
    query_prompt: Annotated[str | None, typer.Option(help="Prompt before queries.")] = None,
    document_prompt: Annotated[
        str | None, typer.Option(help="Prompt before all other texts.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1)] = 300,
    batch: Annotated[int, typer.Option(min=2, help="Records of one step.")] = 64,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 3e-4,
    rank: Annotated[int, typer.Option(min=1, help="LoRA rank, and alpha.")] = 32,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longer texts are truncated.")] = 512,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    work: Annotated[
        Path | None,
        typer.Option(help="Folder for training states and plots; default: a temporary one."),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value of the adapter's recipe, e.g. temperature=0.05."),
    ] = None,
    cpu: CpuOption = False,
) -> None:
    """Train an adapter for your own task, and add it to a model."""
    with exit_on_error():
        from taskvec_train.adapter import add_adapter, open_model  # noqa: PLC0415
        from taskvec_train.recipe import adapter_recipe  # noqa: PLC0415

        model = open_model(base)
        if out is None and not Path(base).is_dir():
            raise TrainingError(f"{base} is not a local folder: set --out to a folder for a copy.")
        options: dict[str, Any] = {
            "steps": steps,
            "batch": batch,
            "lr": lr,
            "rank": rank,
            "alpha": rank,
            "max_tokens": max_tokens,
            "warmup": steps // 10,
        }
        prompts = {"query": query_prompt, "document": document_prompt}
        recipe = adapter_recipe(
            task,
            loss.value,
            [str(path.resolve()) for path in data],
            options,
            prompts={**model.prompts, **{k: v for k, v in prompts.items() if v is not None}},
            changes=changes or (),
        )
        folder = add_adapter(
            model,
            recipe,
            out=out or model.folder,
            data=Path(),
            seed=seed,
            cpu=cpu,
            work=work,
        )
        typer.echo(f"Wrote {folder / 'adapters' / task}. Serve it: taskvec serve --model {folder}")


@app.command()
def teach(
    teacher: Annotated[str, typer.Option(help="A folder, package:NAME/FOLDER, or a hub id.")],
    texts: Annotated[list[Path], typer.Option(help="Files or folders of texts.")],
    out: Annotated[Path, typer.Option(help="Folder for vectors.npy and ids.npy.")],
    instruction: Annotated[str, typer.Option(help="Instruction before every text.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Longer texts are truncated.")] = 512,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one batch.")] = 16_384,
    cpu: CpuOption = False,
) -> None:
    """Write a teacher's vectors of texts to disk: float16 unit vectors, indexed by text hash."""
    with exit_on_error():
        from taskvec_train.data.readers import read_texts  # noqa: PLC0415
        from taskvec_train.loop import new_accelerator  # noqa: PLC0415
        from taskvec_train.teacher import load_teacher, write_teacher_vectors  # noqa: PLC0415

        records = [text for path in texts for text in read_texts(path)]
        loaded = load_teacher(teacher, max_tokens, new_accelerator(cpu=cpu).device)
        written = write_teacher_vectors(loaded, records, instruction, out, batch_tokens)
        vectors = written.vectors
        typer.echo(f"Wrote {len(vectors):,} vectors of {vectors.shape[1]} dimensions to {out}.")


def _write_results(file: Path, document: bytes, tables: str) -> None:
    """Write FILE.json and FILE.md."""
    for suffix, content in ((".json", document), (".md", f"{tables}\n".encode())):
        with atomic_file(file.with_suffix(suffix)) as unfinished:
            unfinished.write_bytes(content)


def _parse_named_model(text: str) -> tuple[str, str]:
    name, equals, model = text.partition("=")
    if not name or not equals or not model:
        raise TrainingError(
            f"--beside {text!r} must be NAME=MODEL, for example seed=path/to/model."
        )
    return name, model


def _read_text(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"{file} cannot be read: {error}.") from None
