"""Parse smaller reference works: dict databases, the World Factbook, FHIR, security guides."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
from lxml import etree

from taskvec_train.data.entries import (
    Entry,
    fill_template,
    is_prose,
    normalise_text,
    passages,
    split_identifier,
)

_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_DEFINE = ("what is {term}", "{term}", "define {term}", "meaning of {term}")
_COUNTRY = (
    "what is the {field} of {country}",
    "{country} {field}",
    "{field} in {country}",
    "tell me about the {field} of {country}",
)


def parse_dictionary(folders: Sequence[Path]) -> Iterator[Entry]:
    """Yield the articles of a dictd database: an index of offsets, and a compressed text."""
    for index in sorted(folders[0].rglob("*.index")):
        text = gzip.decompress(index.with_suffix(".dict.dz").read_bytes())
        for line in index.read_text("utf-8", errors="replace").splitlines():
            term, start, length = line.split("\t")
            if term.startswith(("00database", "00-database")):
                continue
            at = _decode_number(start)
            article = text[at : at + _decode_number(length)].decode("utf-8", errors="replace")
            explained = normalise_text(re.sub(r"[{}_]", "", article))
            explained = re.sub(rf"^{re.escape(term)}\W*", "", explained, flags=re.IGNORECASE)
            for number, passage in enumerate(passages([explained])):
                yield Entry(term, passage, () if number else (fill_template(_DEFINE, term=term),))


def _decode_number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = 64 * value + _DIGITS.index(digit)
    return value


def parse_factbook(folders: Sequence[Path]) -> Iterator[Entry]:
    """Yield country profiles. The entity is the country, the label the profile's chapter."""
    for file in sorted(folders[0].glob("package/*/*.json")):
        profile = orjson.loads(file.read_bytes())
        yield from parse_profile(profile, file.stem)


def parse_profile(profile: Mapping[str, Any], code: str) -> Iterator[Entry]:
    """Yield one country's fields; queries combine the field's and the country's name."""
    names = profile.get("Government", {}).get("Country name", {})
    country = names.get("conventional short form", {}).get("text", "")
    if not country or country == "none":
        return
    for chapter, fields in profile.items():
        for field, value in fields.items():
            question = fill_template(_COUNTRY, field=field.lower(), country=country)
            text = normalise_text("; ".join(_leaves(value)))
            if re.match(r"NA\b", text):
                continue
            for number, passage in enumerate(passages([f"{country}, {field.lower()}: {text}"])):
                yield Entry(code, passage, () if number else (question,), chapter)


def _leaves(value: Any, name: str = "") -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield from _leaves(below, name if key == "text" else key)
    elif value:
        yield f"{name}: {value}" if name and name != "note" else str(value)


def parse_fhir(folders: Sequence[Path]) -> Iterator[Entry]:
    """Yield definitions of elements of health records. The entity is the resource."""
    bundles = folders[0] / "package/dist/fhir/r4"
    for bundle in ("profiles-resources.json", "profiles-types.json"):
        for entry in orjson.loads((bundles / bundle).read_bytes())["entry"]:
            if entry["resource"]["resourceType"] == "StructureDefinition":
                yield from parse_structure(entry["resource"])


def parse_structure(structure: Mapping[str, Any]) -> Iterator[Entry]:
    """Yield the elements of one FHIR resource; short descriptions or paths are the queries."""
    for element in structure.get("snapshot", {}).get("element", []):
        short = normalise_text(element.get("short", ""))
        if "|" in short:  # a list of codes
            short = split_identifier(element["path"])
        for aspect in ("definition", "comment", "requirements"):
            text = normalise_text(element.get(aspect, ""))
            if is_prose(text, 6):
                asks = {"definition": short, "comment": "", "requirements": f"why {short}"}[aspect]
                yield Entry(structure["id"], text[:2000], (asks,) if asks else ())


def parse_guides(folders: Sequence[Path]) -> Iterator[Entry]:
    """Yield security rules in XCCDF; titles are queries for descriptions and rationales."""
    for folder in folders:
        for guide in sorted(folder.rglob("*-xccdf.xml")):
            yield from parse_guide(guide.read_bytes())


def parse_guide(source: bytes) -> Iterator[Entry]:
    """Yield the rules and groups of one XCCDF benchmark. The entity is the rule's id."""
    parser = etree.XMLParser(resolve_entities=False, no_network=True, huge_tree=True)
    for element in etree.fromstring(source, parser).iter("{*}Rule", "{*}Group"):
        title = _part(element, "title")
        entity = element.get("id", "").rpartition("content_")[2]
        for aspect, question in (("description", title), ("rationale", f"why {title.lower()}")):
            for number, passage in enumerate(passages([_part(element, aspect)])):
                if passage:
                    yield Entry(entity, passage, () if number or not title else (question,))


def _part(element: etree._Element, name: str) -> str:
    found = element.find(f"{{*}}{name}")
    return "" if found is None else normalise_text("".join(map(str, found.itertext())))
