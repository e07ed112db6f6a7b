"""The mini corpus: from packages to texts, pairs, grades, classes, and held-out data.

The same versions of packages give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from rich.progress import Progress

from taskvec_train.data.card import write_card
from taskvec_train.data.cleaning import Part, cleaned, deduplicate
from taskvec_train.data.entries import Entry
from taskvec_train.data.heldout import write_held_out
from taskvec_train.data.packages import Apt, Package, fetch_npm, fetch_pip, unpack
from taskvec_train.data.sources import APT_LISTS, SOURCES, Source
from taskvec_train.data.split import is_held_out
from taskvec_train.data.trainset import write_training
from taskvec_train.data.wordnet import Synset, read_synsets
from taskvec_train.files import whole_folder

WORDNET = "debian:wordnet-base"


def build(out: Path, work: Path, workers: int, progress: Progress) -> None:
    """Build the corpus at `out`; what is fetched stays in `work`. Raises TrainingError."""
    with whole_folder(out) as folder:
        packages = fetch(SOURCES, work, progress)
        parts = parse(SOURCES, packages, workers, progress)
        step = progress.add_task("Removing near-duplicates", total=1)
        parts = deduplicate(parts)
        progress.advance(step)
        synsets = read_synsets(packages[WORDNET].folder)
        write(folder, parts, synsets, packages, progress)


def fetch(sources: Sequence[Source], work: Path, progress: Progress) -> dict[str, Package]:
    """Fetch and unpack every package of the sources. Raises TrainingError."""
    wanted = list(dict.fromkeys(name for source in sources for name in source.packages))
    step = progress.add_task("Fetching packages", total=len(wanted))
    apt = Apt(work / "apt")
    apt.update()
    debian = [name.removeprefix("debian:") for name in wanted if name.startswith("debian:")]
    apt.download(debian)
    found = {}
    for name in wanted:
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
) -> list[Part]:
    """Parse and clean every source, several at a time; parts come in the sources' order."""
    step = progress.add_task("Reading sources", total=len(sources))
    with ProcessPoolExecutor(workers) as pool:
        waiting = [
            pool.submit(_parse_one, source, [packages[name].folder for name in source.packages])
            for source in sources
        ]
        parts = []
        for source, entries in zip(sources, waiting, strict=True):
            parts.append(_part(source, entries.result()))
            progress.advance(step)
    return parts


def _parse_one(source: Source, folders: Sequence[Path]) -> list[Entry]:
    return list(cleaned(source.parse(folders)))


def _part(source: Source, entries: Iterable[Entry]) -> Part:
    part = Part(source)
    for entry in entries:
        (part.held_out if is_held_out(source.name, entry.entity) else part.train).append(entry)
    return part


def write(
    folder: Path,
    parts: Sequence[Part],
    synsets: dict[str, Synset],
    packages: dict[str, Package],
    progress: Progress,
) -> None:
    """Write what is trained on, what is held out, and the card."""
    step = progress.add_task("Writing", total=3)
    seen = write_training(folder, parts, synsets)
    progress.advance(step)
    write_held_out(folder / "heldout", parts, synsets, seen)
    progress.advance(step)
    write_card(folder, parts, packages)
    progress.advance(step)
