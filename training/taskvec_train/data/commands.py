"""The commands `corpus` and `mine`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from taskvec_train.data.readers import read_pairs
from taskvec_train.exit import exit_on_error
from taskvec_train.files import write_jsonl


@exit_on_error()
def corpus(
    *,
    out: Annotated[Path, typer.Option(help="Folder for the corpus; must not exist.")],
    work: Annotated[Path, typer.Option(help="Folder for downloaded packages, about 3 GB.")] = Path(
        ".cache/corpus"
    ),
    workers: Annotated[int, typer.Option(min=1, help="Sources to read in parallel.")] = (
        os.cpu_count() or 1
    ),
) -> None:
    """Build the mini corpus from Debian, PyPI and npm packages, with its data card."""
    from taskvec_train.data.corpus import build  # noqa: PLC0415 - imports lxml, which mining does not need

    with _progress() as progress:
        build(out, work.resolve(), workers, progress)


@exit_on_error()
def mine(
    *,
    pairs: Annotated[Path, typer.Option(help="Pairs: a JSONL or Parquet file, or a folder.")],
    anchors: Annotated[Path, typer.Option(help="The teacher's vectors of the anchors, .npy.")],
    positives: Annotated[Path, typer.Option(help="The teacher's vectors of the positives, .npy.")],
    out: Annotated[Path, typer.Option(help="JSONL file to write.")],
    count: Annotated[int, typer.Option(help="Maximum negatives of a pair.")] = 7,
    share: Annotated[
        float, typer.Option(help="Negatives have a similarity below this share of the positive's.")
    ] = 0.95,
    first: Annotated[int, typer.Option(help="First rank of the candidates, from 0.")] = 0,
    last: Annotated[int, typer.Option(help="End rank of the candidates (exclusive).")] = 100,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Mine hard negatives for pairs with a teacher's vectors, without likely answers."""
    from taskvec_train.data import mining  # noqa: PLC0415 - imports torch, which is slow

    data = read_pairs(pairs)
    options = mining.Mining(count=count, share=share, first=first, last=last)
    anchor_vectors = mining.load_vectors(anchors, len(data))
    positive_vectors = mining.load_vectors(positives, len(data))
    with _progress() as progress:
        step = progress.add_task("Mining", total=len(data))
        mined = mining.mine(
            data,
            anchor_vectors,
            positive_vectors,
            options,
            device=device,
            advance=lambda done: progress.advance(step, done),
        )
        write_jsonl(
            out,
            (
                {"anchor": pair.anchor, "positive": pair.positive, "negatives": pair.negatives}
                for pair in mined
            ),
        )


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    )
