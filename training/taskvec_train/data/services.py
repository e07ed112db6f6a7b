"""Descriptions of web services: what operations and fields do.

Two dialects: botocore's service models, and Google's discovery documents.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
from lxml import html

from taskvec_train.data.entries import Entry, ask, passages, spoken, tidy

_OPERATION_QUESTIONS = (
    "how do I {what} in {service}",
    "{service} {what}",
    "{what}",
    "{service}: {what}",
)
_LEAST_WORDS = 8


def parse_botocore(folders: Sequence[Path]) -> Iterator[Entry]:
    """The newest model of every service. The entity is the operation or the shape."""
    for service in sorted(folders[0].glob("botocore/data/*/")):
        models = sorted(service.glob("*/service-2.json.gz"))
        if models:
            yield from parse_service_model(orjson.loads(gzip.decompress(models[-1].read_bytes())))


def parse_service_model(model: Mapping[str, Any]) -> Iterator[Entry]:
    """Operations and fields of one botocore service model."""
    meta = model["metadata"]
    service = meta.get("serviceAbbreviation") or meta["serviceFullName"]
    for name, operation in model["operations"].items():
        question = ask(_OPERATION_QUESTIONS, what=spoken(name), service=service)
        yield from _described(f"{service}/{name}", question, operation.get("documentation"))
    for name, shape in model["shapes"].items():
        yield from _described(
            f"{service}/{name}", f"{service} {spoken(name)}", shape.get("documentation")
        )
        for field, member in shape.get("members", {}).items():
            question = f"{service} {spoken(name)}: {spoken(field)}"
            yield from _described(f"{service}/{name}", question, member.get("documentation"))


def parse_discovery(folders: Sequence[Path]) -> Iterator[Entry]:
    """Google's APIs, each in its last stable version. The entity is the method or the schema."""
    newest: dict[str, Path] = {}
    documents = (folders[0] / "googleapiclient/discovery_cache/documents").glob("*.json")
    for document in sorted(documents, key=lambda path: ("beta" not in path.name, path.name)):
        newest[document.name.partition(".")[0]] = document
    for _, document in sorted(newest.items()):
        content = orjson.loads(document.read_bytes())
        if "title" in content:  # else it is the list of all APIs
            yield from parse_discovery_document(content)


def parse_discovery_document(document: Mapping[str, Any]) -> Iterator[Entry]:
    """Methods, parameters and schema fields of one API."""
    service = document["title"]
    for name, schema in document.get("schemas", {}).items():
        entity = f"{service}/{name}"
        yield from _described(entity, f"{service} {spoken(name)}", schema.get("description"))
        for field, value in schema.get("properties", {}).items():
            question = f"{service} {spoken(name)}: {spoken(field)}"
            yield from _described(entity, question, value.get("description"))
    yield from _methods(document, service)


def _methods(resource: Mapping[str, Any], service: str) -> Iterator[Entry]:
    for method in resource.get("methods", {}).values():
        entity = f"{service}/{method['id']}"
        parts = method["id"].split(".")
        what = spoken(f"{parts[-1]} {parts[-2]}")
        question = ask(_OPERATION_QUESTIONS, what=what, service=service)
        yield from _described(entity, question, method.get("description"))
        for field, value in method.get("parameters", {}).items():
            question = f"{service} {what}: {spoken(field)}"
            yield from _described(entity, question, value.get("description"))
    for below in resource.get("resources", {}).values():
        yield from _methods(below, service)


def _described(entity: str, question: str, documentation: str | None) -> Iterator[Entry]:
    text = plain(documentation or "")
    if text.count(" ") + 1 < _LEAST_WORDS:
        return
    for number, passage in enumerate(passages([text])):
        yield Entry(entity, passage, () if number else (question,))


def plain(markup: str) -> str:
    """The text of a scrap of HTML, blocks set apart by spaces."""
    if "<" not in markup:
        return tidy(markup)
    spaced = re.sub(r"<(/?(?:p|li|ul|ol|note|important|div|dt|dd|br|h\d))\b", r" <\1", markup)
    return tidy(str(html.fragment_fromstring(spaced, create_parent="div").text_content()))
