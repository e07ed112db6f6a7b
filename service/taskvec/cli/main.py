"""The commands of ``taskvec``, declared with typer.

Options are parsed here; libraries that are slow to import are imported inside the command that
needs them.
"""

from __future__ import annotations

import enum
import hashlib
import inspect
import os
import secrets
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from pydantic import SecretStr

from taskvec import __version__
from taskvec.auth.keys import is_name
from taskvec.checkpoint.open import DEFAULT_MODEL, open_checkpoint
from taskvec.cli.exit import EXIT_USAGE, exit_on_error, exit_with, name_missing_extra
from taskvec.core.output_format import OutputType
from taskvec.settings import AdapterMode, Dtype, Settings, environment_variable
from taskvec.telemetry.logs import configure_logs

app = typer.Typer(
    help="Text embeddings with a task adapter selected per request.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's table truncates long option names
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Baseline(enum.Enum):
    """Retrieval method to compare the model with."""

    BM25 = "bm25"


ModelArgument = Annotated[
    str, typer.Argument(help="Checkpoint folder, hub id, or the built-in taskvec-mini.")
]
RevisionOption = Annotated[
    str | None,
    typer.Option(help="Hub branch, tag or commit; if not set, the hub's default branch."),
]
TaskNameOption = Annotated[
    str | None,
    typer.Option(
        help="Task of a model without adapters, such as clustering; if not set, by its name and "
        "its prompts."
    ),
]
DeviceOption = Annotated[str, typer.Option(help="Device: auto, cpu, cuda or cuda:N.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Number type of the arithmetic.")]
ModeOption = Annotated[
    AdapterMode,
    typer.Option(
        help="merged: full weights per adapter; low-rank: factors beside shared weights; auto: "
        "merged if memory permits."
    ),
]
ModelOption = Annotated[
    str, typer.Option(help="Checkpoint folder, hub id, or the built-in taskvec-mini.")
]
UrlOption = Annotated[
    str | None,
    typer.Option(
        help="URL of a running service to evaluate instead of --model. Its API key, if it needs "
        "one, is read from TASKVEC_EVAL_KEY."
    ),
]


def check_options(device: str, task_name: str | None) -> None:
    """Reject values that no setting may have.

    Raises:
        ValidationError: an option is invalid.
    """
    Settings(device=device, task_name=task_name)


def main() -> None:
    """Run the command line; entry point of the console script."""
    app()


def _serve(**options: Any) -> None:
    """Serve a model over HTTP.

    The routes are /v1/embeddings (OpenAI, Jina and Voyage fields), /v1/models, health, metrics and
    /docs. Every option has an environment variable; the option has precedence. The secrets
    TASKVEC_API_KEYS and TASKVEC_ENGINE_API_KEY have a variable only.
    """
    given = {name: value for name, value in options.items() if value not in (None, [], ())}
    # The processes that this one launches import nothing from the working directory.
    os.environ["PYTHONSAFEPATH"] = "1"
    with exit_on_error():
        settings = Settings(**given)
        request_log = configure_logs(settings.log_level)
        if settings.workers == 1:
            from taskvec.server.run import serve  # noqa: PLC0415 - slow to import

            serve(settings, request_log)
        else:
            from taskvec.server.workers import serve_workers  # noqa: PLC0415

            serve_workers(settings)


def _settings_signature() -> inspect.Signature:
    """Return a signature with one option per setting, so that help and settings always agree."""
    parameters = []
    for name, field in Settings.model_fields.items():
        kind = _option_type(field.annotation)
        if kind is None:
            continue
        default = field.default
        shown = ",".join(default) if isinstance(default, tuple) else default
        if isinstance(shown, enum.Enum):
            shown = shown.value
        flag = f"--{name.replace('_', '-')}"
        option = typer.Option(
            f"{flag}/--no-{flag[2:]}" if kind is bool else flag,
            help=f"{field.description} Default: {'not set' if shown in (None, '', {}) else shown}.",
            show_default=False,
            readable=False,  # typer would not say who may not read a file
            envvar=environment_variable(name),
        )
        annotation = Annotated[Optional[kind], option]  # type: ignore[valid-type] # noqa: UP045
        parameters.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
            )
        )
    return inspect.Signature(parameters)


def _option_type(annotation: Any) -> Any:
    """Return the type of a setting's option; None for a secret, which has no option."""
    if annotation == SecretStr | None:
        return None
    if annotation == tuple[str, ...]:
        return list[str]
    if annotation == dict[str, Any]:
        return str
    return annotation


_serve.__signature__ = _settings_signature()  # type: ignore[attr-defined]
_serve.__annotations__ = {
    name: parameter.annotation for name, parameter in _settings_signature().parameters.items()
}
app.command("serve")(_serve)


@app.command()
def check(  # noqa: PLR0917 - typer calls it by name
    model: ModelArgument = DEFAULT_MODEL,
    revision: RevisionOption = None,
    task_name: TaskNameOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.AUTO,
    adapter_mode: ModeOption = AdapterMode.AUTO,
) -> None:
    """Print a model's card and run its self-test.

    The self-test is the one that the server runs at startup: every adapter must change the vectors.
    Exits with 3 and the reason if the model cannot be served.
    """
    with exit_on_error():
        configure_logs("warning")
        check_options(device, task_name)  # before anything is printed
        checkpoint = open_checkpoint(model, revision, task_name)
        card = checkpoint.card
        from taskvec.service import task_table  # noqa: PLC0415 - tasks only where a card is printed

        rows = {
            "model": card.name,
            "revision": card.revision or "none (a folder)",
            "folder": checkpoint.folder,
            "architecture": f"{card.architecture}, {checkpoint.backbone.layers} layers",
            "parameters": f"{card.parameters:,}",
            "dimensions": card.dimension,
            "matryoshka": ", ".join(map(str, card.matryoshka)) or "not stated",
            "max tokens": card.max_tokens,
            "vocabulary": card.vocabulary,
        }
        for label, value in rows.items():
            typer.echo(f"{label:<13} {value}")
        merged = checkpoint.merged_task
        if merged is not None:
            typer.echo(f"{'merged task':<13} {merged.name}: stated by {merged.source}")
        for task in task_table(checkpoint):
            adapter = task.adapter or "none"
            typer.echo(f"{'task':<13} {task.name}: adapter {adapter}, prompt {task.prompt!r}")
        from taskvec.library import Embedder  # noqa: PLC0415 - loads torch

        with Embedder(
            model,
            revision=revision,
            task_name=task_name,
            device=device,
            dtype=dtype,
            adapter_mode=adapter_mode,
        ) as embedder:
            names = embedder.tasks
            for name in names:
                embedder.embed("A text.", task=name)
        adapters = len(card.adapters)
        typer.echo(
            f"{'self-test':<13} passed: {adapters} adapters, each gives different vectors"
            if adapters
            else f"{'self-test':<13} passed: no adapters, tasks {', '.join(names)}"
        )


@app.command()
def embed(  # noqa: PLR0917 - typer calls it by name
    model: ModelOption = DEFAULT_MODEL,
    task: Annotated[
        str | None,
        typer.Option(help="Task; `taskvec check` lists them. If not set, the default task."),
    ] = None,
    dimensions: Annotated[
        int | None, typer.Option(help="Number of leading values to keep; if not set, all.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Write one float32 array to this .npy file, instead of JSON lines."),
    ] = None,
    truncate: Annotated[
        bool, typer.Option(help="Truncate lines that are too long, instead of failing.")
    ] = False,
    revision: RevisionOption = None,
    task_name: TaskNameOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.AUTO,
) -> None:
    """Embed the lines of standard input.

    Each line is one text. Writes one line of JSON per text to standard output. Shows progress if
    standard error is a terminal.
    """
    with exit_on_error():
        configure_logs("warning")
        check_options(device, task_name)  # before a line is read
        from taskvec.cli.embed import embed_lines  # noqa: PLC0415 - loads torch
        from taskvec.library import Embedder  # noqa: PLC0415

        with Embedder(
            model, revision=revision, task_name=task_name, device=device, dtype=dtype
        ) as embedder:
            embed_lines(
                embedder,
                sys.stdin.buffer,
                output or sys.stdout.buffer,
                task=task,
                dimensions=dimensions,
                truncate=truncate,
            )


@app.command("eval")
def evaluate(  # noqa: PLR0917 - typer calls it by name
    data: Annotated[
        list[Path],
        typer.Option(help="Folder or file of held-out data; repeat for several."),
    ],
    model: ModelOption = DEFAULT_MODEL,
    url: UrlOption = None,
    task: Annotated[
        Optional[list[str]],  # noqa: UP045 - typer reads it
        typer.Option(help="Adapter, or base; repeat for several. If not set, all."),
    ] = None,
    dimensions: Annotated[
        Optional[list[int]],  # noqa: UP045
        typer.Option(
            help="Number of leading values to keep; repeat for several. If not set, the model's "
            "Matryoshka dimensions."
        ),
    ] = None,
    output: Annotated[list[OutputType], typer.Option(help="Output type; repeat for several.")] = [  # noqa: B006 - only read
        OutputType.FLOAT,
        OutputType.INT8,
        OutputType.BINARY,
    ],
    baseline: Annotated[
        Optional[Baseline],  # noqa: UP045
        typer.Option(help="Also score retrieval by a method without a model."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write all scores to this JSON file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Plot quality against bytes per vector to this PNG file.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of k-means.")] = 0,
    revision: RevisionOption = None,
    task_name: TaskNameOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.AUTO,
) -> None:
    """Evaluate the quality of a model's vectors.

    Scores every task at every number of dimensions in every output type. The kind of the data is
    detected: folders in BEIR's format (retrieval), folders with train.jsonl and
    test.jsonl of {text, label} (classification, clustering), files of {text_a, text_b, score} (sts)
    and of {text, label} (clustering). Needs taskvec[eval].
    """
    with exit_on_error(), name_missing_extra():
        configure_logs("warning")
        check_options(device, task_name)
        from taskvec.cli.evaluate import (  # noqa: PLC0415 - loads scikit-learn
            EvalOptions,
            ModelSource,
            run_eval,
        )

        run_eval(
            EvalOptions(
                data=data,
                tasks=task or [],
                dimensions=dimensions or [],
                outputs=output,
                bm25=baseline is Baseline.BM25,
                json=json,
                plot=plot,
                seed=seed,
            ),
            ModelSource(model, url, revision, device, dtype, task_name),
        )


@app.command("eval-mteb")
def evaluate_mteb(  # noqa: PLR0917 - typer calls it by name
    tasks: Annotated[
        Optional[list[str]],  # noqa: UP045 - typer reads it
        typer.Option(help="Name of an MTEB task; repeat for several."),
    ] = None,
    benchmark: Annotated[
        str | None, typer.Option(help="Name of an MTEB benchmark, such as 'MTEB(eng, v2)'.")
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
    url: UrlOption = None,
    task: Annotated[
        str | None,
        typer.Option(help="Adapter for all tasks. If not set, chosen by the kind of each task."),
    ] = None,
    dimensions: Annotated[
        int | None, typer.Option(help="Number of leading values to keep; if not set, all.")
    ] = None,
    output: Annotated[OutputType, typer.Option(help="Output type.")] = OutputType.FLOAT,
    results: Annotated[
        Path,
        typer.Option(help="Folder for results; tasks with a result there are not run again."),
    ] = Path("mteb-results"),
    revision: RevisionOption = None,
    task_name: TaskNameOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.AUTO,
) -> None:
    """Run the MTEB benchmark on a model or a service.

    The mteb package downloads its data from the hub. Needs taskvec[eval,mteb].
    """
    with exit_on_error(), name_missing_extra():
        configure_logs("warning")
        check_options(device, task_name)
        if not tasks and benchmark is None:
            exit_with("Nothing to run: set --tasks or --benchmark.", EXIT_USAGE)
        from taskvec.cli.evaluate import ModelSource  # noqa: PLC0415
        from taskvec.evaluation.benchmark import run_named  # noqa: PLC0415 - loads mteb

        with ModelSource(model, url, revision, device, dtype, task_name).open() as opened:
            run_named(
                opened,
                tasks=tasks or [],
                benchmark=benchmark,
                adapter=task,
                dimensions=dimensions,
                output=output,
                folder=results,
            )


@app.command("engine-args")
def engine_args(  # noqa: PLR0917 - typer calls it by name
    model: ModelArgument = DEFAULT_MODEL,
    revision: RevisionOption = None,
    task_name: TaskNameOption = None,
    device: Annotated[str, typer.Option(help="Device of the vLLM server: cuda or cpu.")] = "cuda",
    dtype: DtypeOption = Dtype.AUTO,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Folder for the copy of the model that vLLM reads.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=0, help="Maximum tokens in one text; 0 means the model's limit.")
    ] = 0,
) -> None:
    """Print the `vllm serve` command for a model.

    The command serves the model with all its adapters. It needs a copy of the model for vLLM, which
    is made here, and must run where this copy and the adapters' folders have the same paths.
    """
    with exit_on_error():
        configure_logs("warning")
        check_options("auto", task_name)
        if device not in ("cuda", "cpu"):
            exit_with(f"--device must be cuda or cpu, got {device}", EXIT_USAGE)
        from taskvec.checkpoint.vllm_copy import make_vllm_copy  # noqa: PLC0415
        from taskvec.engines.vllm.arguments import VllmOptions, server_command  # noqa: PLC0415

        checkpoint = open_checkpoint(model, revision, task_name)
        folder = make_vllm_copy(checkpoint, (cache_dir or Settings().cache).absolute())
        options = VllmOptions(dtype=dtype, max_tokens=max_tokens)
        typer.echo(shlex.join(server_command(checkpoint, folder, options, gpu=device == "cuda")))


@app.command()
def key(name: Annotated[str, typer.Argument(help="Name of the key in logs and metrics.")]) -> None:
    """Create an API key.

    Prints its entry for --keys-file on standard output and its secret on standard error. The secret
    is shown only once: the entry contains only its SHA-256.
    """
    if not is_name(name):
        exit_with(
            f"{name!r} is not a valid name for a key: use letters, digits, dots, dashes and "
            "underscores.",
            EXIT_USAGE,
        )
    secret = f"tv-{secrets.token_urlsafe(32)}"
    typer.echo(f"The secret of {name}, shown only once: {secret}", err=True)
    digest = hashlib.sha256(secret.encode()).hexdigest()
    typer.echo(f'[[keys]]\nname = "{name}"\nsha256 = "{digest}"')


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)
