"""The commands: serve, embed, eval, check, key."""

from __future__ import annotations

import enum
import hashlib
import inspect
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
from taskvec.cli.exit import USAGE, exit_on_error, exit_with, name_missing_extra
from taskvec.core.job import OutputType
from taskvec.settings import AdapterMode, Dtype, Settings, environment_variable
from taskvec.telemetry.logs import configure_logs

app = typer.Typer(
    help="Text embeddings that pick the task adapter per request.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's table cuts long option names
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Baseline(enum.Enum):
    """What retrieval is scored by beside the model."""

    BM25 = "bm25"


ModelArgument = Annotated[
    str, typer.Argument(help="A checkpoint folder, a hub id, or the built-in taskvec-mini.")
]
RevisionOption = Annotated[
    str | None, typer.Option(help="Hub branch, tag or commit; the newest if none.")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Number type of the arithmetic.")]
ModeOption = Annotated[AdapterMode, typer.Option(help="How adapters are held.")]
ModelOption = Annotated[str, typer.Option(help="A folder, a hub id, or the built-in taskvec-mini.")]
UrlOption = Annotated[
    str | None,
    typer.Option(help="A running service instead; its key, if any, in TASKVEC_EVAL_KEY."),
]


def main() -> None:
    """The console script."""
    app()


def _serve(**options: Any) -> None:
    """Serve a model over HTTP: OpenAI's /v1/embeddings, health, metrics and /docs.

    Every option can be set by its environment variable instead. The secrets TASKVEC_API_KEYS and
    TASKVEC_ENGINE_API_KEY only by that.
    """
    given = {name: value for name, value in options.items() if value not in (None, [], ())}
    with exit_on_error():
        settings = Settings(**given)
        configure_logs(settings.log_level)
        if settings.workers == 1:
            from taskvec.server.run import serve  # noqa: PLC0415 - only this needs a server

            serve(settings)
        else:
            from taskvec.server.workers import serve_workers  # noqa: PLC0415

            serve_workers(settings)


def _settings_signature() -> inspect.Signature:
    """One option for each setting, so that help and settings cannot drift apart."""
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
            help=f"{field.description} Default: {'none' if shown in (None, '', {}) else shown}.",
            show_default=False,
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
    """What typer reads a setting as; None for a secret, which is read from its variable alone."""
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
def check(
    model: ModelArgument = DEFAULT_MODEL,
    revision: RevisionOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.AUTO,
    adapter_mode: ModeOption = AdapterMode.AUTO,
) -> None:
    """Read a model, prove its adapters as the server does before it is ready, print its card.

    Exits with 3 and the reason where the model cannot be served.
    """
    with exit_on_error():
        configure_logs("warning")
        Settings(device=device)  # refused before anything is printed
        checkpoint = open_checkpoint(model, revision)
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
        for task in task_table(checkpoint):
            adapter = task.adapter or "none"
            typer.echo(f"{'task':<13} {task.name}: adapter {adapter}, prompt {task.prompt!r}")
        from taskvec.library import Embedder  # noqa: PLC0415 - loads torch

        with Embedder(
            model, revision=revision, device=device, dtype=dtype, adapter_mode=adapter_mode
        ) as embedder:
            for name in embedder.tasks:
                embedder.embed("A text.", task=name)
        proven = len(card.adapters)
        typer.echo(
            f"{'self-test':<13} passed: {proven} adapters, each changes the vector in its own way"
            if proven
            else f"{'self-test':<13} passed: no adapters, one task"
        )


@app.command()
def embed(  # noqa: PLR0917 - typer calls it by name
    model: ModelOption = DEFAULT_MODEL,
    task: Annotated[str | None, typer.Option(help="The task; taskvec check lists them.")] = None,
    dimensions: Annotated[
        int | None, typer.Option(help="Keep the first so many values; all if not given.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Write one float32 array to this .npy file instead of JSON lines."),
    ] = None,
    truncate: Annotated[
        bool, typer.Option(help="Cut lines that are too long, instead of refusing them.")
    ] = False,
    revision: RevisionOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.AUTO,
) -> None:
    """Embed standard input, one text a line, to JSON lines on standard output.

    Shows progress where standard error is a terminal.
    """
    with exit_on_error():
        configure_logs("warning")
        Settings(device=device)  # refused before a line is read
        from taskvec.cli.embed import embed_lines  # noqa: PLC0415 - loads torch
        from taskvec.library import Embedder  # noqa: PLC0415

        with Embedder(model, revision=revision, device=device, dtype=dtype) as embedder:
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
        typer.Option(help="A folder or file of held-out data; may be given several times."),
    ],
    model: ModelOption = DEFAULT_MODEL,
    url: UrlOption = None,
    task: Annotated[
        Optional[list[str]],  # noqa: UP045 - typer reads it
        typer.Option(help="An adapter, or base; may be given several times. Default: all."),
    ] = None,
    dimensions: Annotated[
        Optional[list[int]],  # noqa: UP045
        typer.Option(help="Keep so many values; may be given several times. Default: Matryoshka's"),
    ] = None,
    output: Annotated[
        list[OutputType], typer.Option(help="An output type; may be given several times.")
    ] = [OutputType.FLOAT, OutputType.INT8, OutputType.BINARY],  # noqa: B006 - only read
    baseline: Annotated[
        Optional[Baseline],  # noqa: UP045
        typer.Option(help="Score retrieval without a model, too."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write all figures to this file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw quality against bytes per vector to this PNG file.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the k-means starts.")] = 0,
    revision: RevisionOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.AUTO,
) -> None:
    """Say how good a model's vectors are: each task, at each dimension, in each output type.

    Data is found by its shape: folders in BEIR's form (retrieval), folders with train.jsonl and
    test.jsonl of {text, label} (classification, clustering), files of {text_a, text_b, score} (sts)
    and of {text, label} (clustering). Needs taskvec[eval].
    """
    with exit_on_error(), name_missing_extra():
        configure_logs("warning")
        Settings(device=device)
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
            ModelSource(model, url, revision, device, dtype),
        )


@app.command("eval-mteb")
def evaluate_mteb(  # noqa: PLR0917 - typer calls it by name
    tasks: Annotated[
        Optional[list[str]],  # noqa: UP045 - typer reads it
        typer.Option(help="A task of MTEB by its name; may be given several times."),
    ] = None,
    benchmark: Annotated[
        str | None, typer.Option(help="All tasks of one of its benchmarks: 'MTEB(eng, v2)'.")
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
    url: UrlOption = None,
    task: Annotated[
        str | None, typer.Option(help="One adapter for all, instead of the one that fits.")
    ] = None,
    dimensions: Annotated[
        int | None, typer.Option(help="Keep the first so many values; all if not given.")
    ] = None,
    output: Annotated[OutputType, typer.Option(help="The output type.")] = OutputType.FLOAT,
    results: Annotated[
        Path, typer.Option(help="Folder for results; a task that has one is not run again.")
    ] = Path("mteb-results"),
    revision: RevisionOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.AUTO,
) -> None:
    """Run the public benchmark MTEB on a model or a service.

    Its package fetches its data from a hub. Needs taskvec[eval,mteb].
    """
    with exit_on_error(), name_missing_extra():
        configure_logs("warning")
        Settings(device=device)
        if not tasks and benchmark is None:
            exit_with("Nothing to run: name --tasks or a --benchmark.", USAGE)
        from taskvec.cli.evaluate import ModelSource  # noqa: PLC0415
        from taskvec.evaluation.benchmark import run_named  # noqa: PLC0415 - loads mteb

        with ModelSource(model, url, revision, device, dtype).open() as opened:
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
    device: Annotated[str, typer.Option(help="What the server runs on: cuda or cpu.")] = "cuda",
    dtype: DtypeOption = Dtype.AUTO,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Where the copy that vLLM reads is made.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=0, help="Longest text; 0 for the model's limit.")
    ] = 0,
) -> None:
    """Print the vllm serve command line that fits a model, one adapter a task.

    Makes the copy that vLLM reads: its folder, and the adapters' folders, must be there under the
    same paths where the command runs.
    """
    with exit_on_error():
        configure_logs("warning")
        if device not in ("cuda", "cpu"):
            exit_with(f"--device must be cuda or cpu, got {device}", USAGE)
        from taskvec.checkpoint.vllm_copy import make_vllm_copy  # noqa: PLC0415
        from taskvec.engines.vllm.arguments import VllmOptions, server_command  # noqa: PLC0415

        checkpoint = open_checkpoint(model, revision)
        folder = make_vllm_copy(checkpoint, (cache_dir or Settings().cache).absolute())
        options = VllmOptions(dtype=dtype, max_tokens=max_tokens)
        typer.echo(shlex.join(server_command(checkpoint, folder, options, gpu=device == "cuda")))


@app.command()
def key(name: Annotated[str, typer.Argument(help="What logs and metrics call the key.")]) -> None:
    """Make an API key: its entry for --keys-file on standard output, its secret on standard error.

    The secret is told this once: the file has only its SHA-256.
    """
    if not is_name(name):
        exit_with(
            f"{name!r} is no name for a key: letters, digits, dots, dashes, underscores.", USAGE
        )
    secret = f"tv-{secrets.token_urlsafe(32)}"
    typer.echo(f"The secret of {name}, told this once: {secret}", err=True)
    digest = hashlib.sha256(secret.encode()).hexdigest()
    typer.echo(f'[[keys]]\nname = "{name}"\nsha256 = "{digest}"')


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)
