"""Parsers of the other sources."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from taskvec_train.data.descriptions import parse_descriptions
from taskvec_train.data.docstrings import parse_module
from taskvec_train.data.entries import Entry, split_identifier
from taskvec_train.data.records import DataError
from taskvec_train.data.references import (
    parse_dictionary,
    parse_guide,
    parse_profile,
    parse_structure,
)
from taskvec_train.data.services import parse_discovery_document, parse_service_model
from taskvec_train.data.sources import SOURCES

PACKAGES = """\
Package: libwidget1
Source: widget (1.2)
Section: contrib/libs
Description-md5: 1

Package: widget
Section: utils

"""
DESCRIPTIONS = """\
Package: libwidget1
Description-en: library of widgets
 A widget is a small part of a machine.
 It has many uses.
 .
 This package has the library.

Package: widget
Description-en: program that makes widgets
 Makes widgets of any size.

Package: gone
Description-en: not in the list of packages
 Not wanted.

"""


def test_short_descriptions_are_queries_for_long_ones(tmp_path: Path):
    """Paragraphs are joined; the entity is the source package, the label the section."""
    (tmp_path / "deb_main_binary-amd64_Packages").write_text(PACKAGES)
    (tmp_path / "deb_main_i18n_Translation-en").write_text(DESCRIPTIONS)
    (tmp_path / "deb_InRelease").write_text("Origin: Debian\nCodename: bookworm\n")
    for other in ("a", "b"):  # updates, and another archive
        (tmp_path / f"{other}_main_binary-amd64_Packages").write_text(PACKAGES)
        (tmp_path / f"{other}_main_i18n_Translation-en").write_text(DESCRIPTIONS)
    (tmp_path / "a_InRelease").write_text("Origin: Debian\nCodename: bookworm-updates\n")
    (tmp_path / "b_InRelease").write_text("Origin: Elsewhere\nCodename: bookworm\n")
    library, program = parse_descriptions([tmp_path])
    assert library.entity == program.entity == "widget"
    assert library.text == (
        "A widget is a small part of a machine. It has many uses. This package has the library."
    )
    assert [library.label, program.label] == ["libs", "utils"]
    assert all(len(entry.anchors) == 1 for entry in (library, program))


def test_without_a_debian_release_there_are_no_descriptions(tmp_path: Path):
    """Lists without a Debian release are an error."""
    (tmp_path / "b_InRelease").write_text("Origin: Elsewhere\nCodename: bookworm\n")
    with pytest.raises(DataError, match="has no list of a Debian release"):
        next(parse_descriptions([tmp_path]))


def test_names_and_summaries_are_queries_for_docstrings():
    """Code, rulers and markup are removed; a file that is not Python yields nothing."""
    source = '''
class Circle:
    """A round thing."""

    def area(self, unit):
        """Return the area.

        The area is :func:`math.pi` times the square of the radius, in the unit that was asked for.

        Parameters
        ----------
        unit : str

        >>> Circle(1).area("m")
        3.14
        """
'''
    short, long = parse_module(source, "shapes.py", "geometry")
    assert short.text == "A round thing."
    assert "Circle" in short.anchors[0]
    assert "Circle.area" in long.anchors[0]
    assert long.anchors[1] == "Return the area."
    assert long.text.startswith("The area is math.pi times")
    assert ">>>" not in long.text
    assert "---" not in long.text
    assert list(parse_module("print 'old'", "old.py", "x")) == []


def test_a_service_model_gives_operations_and_fields():
    """Markup is removed, and descriptions of a few words are dropped."""
    model = {
        "metadata": {"serviceFullName": "Amazon Queues"},
        "operations": {
            "CreateQueue": {
                "documentation": "<p>Creates a queue with the name that you give.</p>"
                "<p>Names are unique.</p>"
            }
        },
        "shapes": {
            "CreateQueueRequest": {
                "members": {
                    "QueueName": {
                        "documentation": "<p>The name of the queue, of at most 80 characters.</p>"
                    },
                    "Tags": {"documentation": "<p>Tags.</p>"},
                }
            }
        },
    }
    operation, member = parse_service_model(model)
    assert operation.text == "Creates a queue with the name that you give. Names are unique."
    assert "create queue" in operation.anchors[0]
    assert member.anchors == ("Amazon Queues create queue request: queue name",)


def test_a_discovery_document_gives_methods_and_fields():
    """Methods of nested resources are found, with their parameters."""
    document = {
        "title": "Books API",
        "schemas": {
            "Shelf": {
                "properties": {"title": {"description": "The title that people see on the shelf."}}
            }
        },
        "resources": {
            "shelves": {
                "resources": {
                    "books": {
                        "methods": {
                            "list": {
                                "id": "books.shelves.books.list",
                                "description": "Lists the books on a shelf, in their usual order.",
                                "parameters": {"q": {"description": "short"}},
                            }
                        }
                    }
                }
            }
        },
    }
    field, method = parse_discovery_document(document)
    assert field.anchors == ("Books API shelf: title",)
    assert "list books" in method.anchors[0]


def test_a_dictionary_is_read_through_its_index(tmp_path: Path):
    """Offsets are base-64 numbers; the headword and the database's own entries are dropped."""
    info, article = b"00-database-info\nAbout.\n", b"CYNIC, n. One who sees {things} as they are.\n"
    (tmp_path / "x.dict.dz").write_bytes(gzip.compress(info + article))
    (tmp_path / "x.index").write_text("00databaseinfo\tA\tY\ncynic\tY\tt\n")
    (entry,) = parse_dictionary([tmp_path])
    assert entry.text == "n. One who sees things as they are."
    assert "cynic" in entry.anchors[0]


def test_a_country_profile_gives_one_passage_a_field():
    """Nested values are joined, unavailable ones dropped, and the chapter is the label."""
    profile = {
        "Government": {"Country name": {"conventional short form": {"text": "Freedonia"}}},
        "Economy": {
            "Exports": {"text": "$3 million", "note": {"text": "of hats"}},
            "Imports": {"text": "NA"},
        },
    }
    name, exports = parse_profile(profile, "fr")
    assert name.label == "Government"
    assert exports.text == "Freedonia, exports: $3 million; of hats"
    assert exports.label == "Economy"
    assert list(parse_profile({"Economy": {}}, "xx")) == []


def test_short_descriptions_are_queries_for_health_record_elements():
    """Definition and requirements are passages; a list of codes is not a query."""
    structure = {
        "id": "Patient",
        "snapshot": {
            "element": [
                {
                    "path": "Patient.gender",
                    "short": "male | female",
                    "definition": "The gender that the patient is considered to have for records.",
                    "requirements": "Needed for identification of the individual with others.",
                }
            ]
        },
    }
    definition, why = parse_structure(structure)
    assert definition.anchors == ("patient gender",)
    assert why.anchors == ("why patient gender",)


def test_titles_are_queries_for_security_rules():
    """Title, description and rationale are read from XCCDF; the entity has no product name."""
    source = b"""<Benchmark xmlns="urn:x" xmlns:h="urn:h"><Rule id="xccdf_org.content_rule_no_root">
    <title>Disable Root Login</title><description>Set <h:code>no</h:code> in the file.</description>
    <rationale>Root can do anything.</rationale></Rule></Benchmark>"""
    assert list(parse_guide(source)) == [
        Entry("rule_no_root", "Set no in the file.", ("Disable Root Login",)),
        Entry("rule_no_root", "Root can do anything.", ("why disable root login",)),
    ]


def test_identifiers_are_split_into_words():
    """CamelCase and snake_case give the same words, including abbreviations."""
    assert (
        split_identifier("CreateHTTPQueue")
        == split_identifier("create_http_queue")
        == "create http queue"
    )


def test_every_source_has_a_licence_and_a_unique_name():
    """Every source has a permissive licence, a credit, and a unique name for its file."""
    assert len({source.name for source in SOURCES}) == len(SOURCES)
    for source in SOURCES:
        assert source.licence
        assert source.credit
        assert not any(word in source.licence for word in ("GPL-", "GFDL", "CC-BY-SA", "MPL"))
