"""Write the data card of a corpus: sources, licences and counts, as Markdown and JSON."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

from taskvec_train.data.cleaning import SourceEntries
from taskvec_train.data.packages import Package
from taskvec_train.data.split import HELD_OUT_SHARE

DATA_CARD = "card.md"
"""File name of the data card in a corpus's folder."""

_INTRODUCTION = f"""# Data card

English text from packages whose licences let anyone use it.
{HELD_OUT_SHARE:.0%} of the entities (senses, source packages, pages, operations) are held out by a
hash of their names; a held-out text that nearly repeats one to train on is dropped.
Near-duplicates across all sources are removed.

| source | licence | credit | packages | passages | pairs | held out |
|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One source in the card."""

    name: str
    licence: str
    credit: str
    packages: tuple[dict[str, str], ...]
    passages: int
    pairs: int
    held_out: int


def write_card(
    folder: Path, parts: Sequence[SourceEntries], packages: Mapping[str, Package]
) -> None:
    """Write `card.json` and `card.md` about all files in `folder`."""
    rows = [_row(part, packages) for part in parts]
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        files[str(path.relative_to(folder))] = {"lines": content.count(b"\n"), "sha256": digest}
    card = {
        "held_out_share": HELD_OUT_SHARE,
        "sources": [asdict(row) for row in rows],
        "files": files,
    }
    (folder / "card.json").write_bytes(orjson.dumps(card, option=orjson.OPT_INDENT_2) + b"\n")
    table = "\n".join(map(_line, rows))
    file_rows = "\n".join(f"| {name} | {file['lines']:,} |" for name, file in files.items())
    (folder / DATA_CARD).write_text(
        f"{_INTRODUCTION}{table}\n\n## Files\n\n| file | lines |\n|---|---|\n{file_rows}\n", "utf-8"
    )


def _row(part: SourceEntries, packages: Mapping[str, Package]) -> Row:
    source = part.source
    found = [packages[name] for name in source.packages]
    return Row(
        name=source.name,
        licence=source.licence,
        credit=source.credit,
        packages=tuple(
            {"name": package.name, "version": package.version, "sha256": package.sha256}
            for package in found
        ),
        passages=len(part.train),
        pairs=sum(len(entry.anchors) for entry in part.train),
        held_out=len(part.held_out),
    )


def _line(row: Row) -> str:
    packages = ", ".join(f"{each['name']} {each['version']}" for each in row.packages)
    return (
        f"| {row.name} | {row.licence} | {row.credit} | {packages} "
        f"| {row.passages:,} | {row.pairs:,} | {row.held_out:,} |"
    )
