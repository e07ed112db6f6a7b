"""Parse API descriptions of web services: documentation of operations and fields.

Two formats: botocore's service models, and Google's discovery documents.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
from lxml import html

from taskvec_train.data.entries import (
    Entry,
    fill_template,
    normalise_text,
    passages,
    split_identifier,
)

_OPERATION_QUESTIONS = (
    "how do I {what} in {service}",
    "{service} {what}",
    "{what}",
    "{service}: {what}",
)
_MIN_WORDS = 8


def parse_botocore(folders: Sequence[Path]) -> Iterator[Entry]:
    """Yield the newest model of every service. The entity is the operation or the shape."""
    for service in sorted(folders[0].glob("botocore/data/*/")):
        models = sorted(service.glob("*/service-2.json.gz"))
        if models:
            yield from parse_service_model(orjson.loads(gzip.decompress(models[-1].read_bytes())))


def parse_service_model(model: Mapping[str, Any]) -> Iterator[Entry]:
    """Yield the operations and fields of one botocore service model."""
    meta = model["metadata"]
    service = meta.get("serviceAbbreviation") or meta["serviceFullName"]
    for name, operation in model["operations"].items():
        question = fill_template(_OPERATION_QUESTIONS, what=split_identifier(name), service=service)
        yield from _documentation_entries(
            f"{service}/{name}", question, operation.get("documentation")
        )
    for name, shape in model["shapes"].items():
        yield from _documentation_entries(
            f"{service}/{name}", f"{service} {split_identifier(name)}", shape.get("documentation")
        )
        for field, member in shape.get("members", {}).items():
            question = f"{service} {split_identifier(name)}: {split_identifier(field)}"
            yield from _documentation_entries(
                f"{service}/{name}", question, member.get("documentation")
            )


def parse_discovery(folders: Sequence[Path]) -> Iterator[Entry]:
    """Yield Google's APIs, each in its last stable version. The entity is the method or schema."""
    newest: dict[str, Path] = {}
    documents = (folders[0] / "googleapiclient/discovery_cache/documents").glob("*.json")
    for document in sorted(documents, key=lambda path: ("beta" not in path.name, path.name)):
        newest[document.name.partition(".")[0]] = document
    for _, document in sorted(newest.items()):
        content = orjson.loads(document.read_bytes())
        if "title" in content:  # otherwise it is the list of all APIs
            yield from parse_discovery_document(content)


def parse_discovery_document(document: Mapping[str, Any]) -> Iterator[Entry]:
    """Yield the methods, parameters and schema fields of one API."""
    service = document["title"]
    for name, schema in document.get("schemas", {}).items():
        entity = f"{service}/{name}"
        yield from _documentation_entries(
            entity, f"{service} {split_identifier(name)}", schema.get("description")
        )
        for field, value in schema.get("properties", {}).items():
            question = f"{service} {split_identifier(name)}: {split_identifier(field)}"
            yield from _documentation_entries(entity, question, value.get("description"))
    yield from _methods(document, service)


def _methods(resource: Mapping[str, Any], service: str) -> Iterator[Entry]:
    for method in resource.get("methods", {}).values():
        entity = f"{service}/{method['id']}"
        parts = method["id"].split(".")
        what = split_identifier(f"{parts[-1]} {parts[-2]}")
        question = fill_template(_OPERATION_QUESTIONS, what=what, service=service)
        yield from _documentation_entries(entity, question, method.get("description"))
        for field, value in method.get("parameters", {}).items():
            question = f"{service} {what}: {split_identifier(field)}"
            yield from _documentation_entries(entity, question, value.get("description"))
    for below in resource.get("resources", {}).values():
        yield from _methods(below, service)


def _documentation_entries(
    entity: str, question: str, documentation: str | None
) -> Iterator[Entry]:
    text = strip_html(documentation or "")
    if text.count(" ") + 1 < _MIN_WORDS:
        return
    for number, passage in enumerate(passages([text])):
        yield Entry(entity, passage, () if number else (question,))


def strip_html(markup: str) -> str:
    """Return the text of an HTML fragment, with spaces between blocks."""
    if "<" not in markup:
        return normalise_text(markup)
    spaced = re.sub(r"<(/?(?:p|li|ul|ol|note|important|div|dt|dd|br|h\d))\b", r" <\1", markup)
    return normalise_text(str(html.fragment_fromstring(spaced, create_parent="div").text_content()))
