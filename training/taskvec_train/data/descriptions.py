"""Parse Debian's package descriptions from apt's package lists."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from taskvec_train.data.entries import Entry, fill_template, normalise_text, passages
from taskvec_train.data.packages import debian_release

_QUESTIONS = (
    "{short}",
    "{short}",
    "which package provides {short}",
    "{name}",
    "what is {name}",
    "{short} package for Debian",
)


def parse_descriptions(folders: Sequence[Path]) -> Iterator[Entry]:
    """Yield long descriptions; names and short descriptions are queries, sections are labels.

    `folders` is one folder with apt's lists: `*_InRelease`, `*_Packages`, `*_Translation-en`.
    """
    release = debian_release(folders[0])  # the lists of updates change daily
    lists = release.name.removesuffix("InRelease") + "main_*"
    sections: dict[str, tuple[str, str]] = {}
    for index in sorted(folders[0].glob(f"{lists}_Packages")):
        for record in _records(index):
            name = record["Package"]
            source = record.get("Source", name).split()[0]
            sections[name] = (source, record.get("Section", "").rpartition("/")[2])
    for index in sorted(folders[0].glob(f"{lists}_Translation-en")):
        for record in _records(index):
            if record["Package"] in sections:
                source, section = sections[record["Package"]]
                yield from _entries(record, source, section)


def _records(index: Path) -> Iterator[dict[str, str]]:
    """Yield RFC 822 style records; continuation lines start with a space."""
    for block in index.read_text("utf-8", errors="replace").split("\n\n"):
        fields = (line.partition(": ") for line in block.replace("\n ", "\x00").splitlines())
        record = {name: value for name, _, value in fields}
        if "Package" in record:
            yield record


def _entries(record: dict[str, str], source: str, section: str) -> Iterator[Entry]:
    short, _, long = record.get("Description-en", "").partition("\x00")
    paragraphs = [
        normalise_text(block.replace("\x00", " ")) for block in re.split(r"\x00\.(?=\x00|$)", long)
    ]
    short = normalise_text(short)
    for number, passage in enumerate(passages([block for block in paragraphs if block])):
        if number:
            yield Entry(source, passage, label=section)
            continue
        question = fill_template(_QUESTIONS, short=short, name=record["Package"])
        yield Entry(source, passage, (question,), section)
