"""The parser of HTML documentation."""

from __future__ import annotations

from pathlib import Path

from taskvec_train.data.documents import parse_documents, parse_page
from taskvec_train.data.entries import MAX_WORDS

SPHINX = b"""<!DOCTYPE html><html><head><title>x</title></head><body>
<div class="sphinxsidebar"><p>Table of contents that nobody wants</p></div>
<div class="body"><section>
<h1>json \xe2\x80\x94 JSON encoder<a class="headerlink" href="#x">\xc2\xb6</a></h1>
<p>JSON is a lightweight format for data.</p>
<pre>&gt;&gt;&gt; import json</pre>
<dl class="py function">
<dt class="sig">json.dumps(obj, *, indent=None)<a class="headerlink" href="#y">\xc2\xb6</a></dt>
<dd><p>Serialize an object to a string. If indent is a number, the string has lines that are
indented by that many spaces, and each member is on a line of its own.</p>
<dl><dt>indent<span class="classifier">int or None</span></dt>
<dd>How far lines are indented.</dd></dl>
</dd></dl>
<h2>How do I sort the keys?</h2>
<ul><li>Pass sort_keys.</li><li><p>Or sort them before.</p></li></ul>
<h2>Examples</h2><p>See above for examples of this.</p>
</section></div></body></html>"""


INDENTED = (
    "If indent is a number, the string has lines that are indented by that many spaces, and "
    "each member is on a line of its own."
)


def test_headings_and_terms_are_queries_for_the_text_below():
    """The queries of a long definition are its name and its first sentence."""
    entries = list(parse_page(SPHINX, "json.html", "python"))
    texts = [entry.text for entry in entries]
    assert texts == [
        "JSON is a lightweight format for data.",
        INDENTED,
        "How far lines are indented.",
        "Pass sort_keys. Or sort them before.",
        "See above for examples of this.",
    ]
    function = entries[1]
    assert "json.dumps" in function.anchors[0]
    assert "obj" not in function.anchors[0]
    assert function.anchors[1] == "Serialize an object to a string"
    assert entries[2].anchors == ("json.dumps indent",)
    assert entries[3].anchors == ("How do I sort the keys?",)
    assert "JSON encoder Examples" in entries[4].anchors[0]
    assert {(entry.entity, entry.label) for entry in entries} == {("json.html", "python")}


def test_a_long_section_is_split_between_sentences():
    """No passage is longer than a model reads, and only the first one has the heading."""
    sentence = "This sentence has exactly seven words here. "
    page = f"<html><body><h1>A long section here</h1><p>{sentence * 100}</p></body></html>"
    entries = list(parse_page(page.encode(), "long.html", "x"))
    assert all(len(entry.text.split()) <= MAX_WORDS for entry in entries)
    assert all(entry.text.endswith("here.") for entry in entries)
    assert sum(len(entry.text.split()) for entry in entries) == 700
    assert [bool(entry.anchors) for entry in entries] == [True, False, False]


def test_pages_without_text_are_skipped(tmp_path: Path):
    """Indexes, other languages and empty pages yield nothing."""
    body = "<html><body><h1>Title</h1><p>Some words of text.</p></body></html>"
    for name, content in {
        "guide.html": body,
        "genindex.html": body,
        "manual/fr/guide.html": body,
        "empty.html": "",
    }.items():
        page = tmp_path / name
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(content)
    assert {entry.entity for entry in parse_documents([tmp_path], "x")} == {"guide.html"}
