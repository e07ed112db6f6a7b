"""The keys file: errors name the entry, and secrets never appear in messages."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from keyfiles import entry
from taskvec.auth.keys import Key, KeyLimits, KeySet, KeySource, Priority, read_pairs
from taskvec.errors import StartError

NO_LIMITS = KeyLimits()
DIGEST = "a" * 64


def source(file: Path | None, pairs: str = "", defaults: KeyLimits = NO_LIMITS) -> KeySource:
    return KeySource(file, pairs, defaults)


def test_a_key_is_found_by_its_secret_alone(tmp_path: Path) -> None:
    """Only the exact secret finds a key; its digest, another case or a part of it does not."""
    file = tmp_path / "keys.toml"
    file.write_text(entry("web", "s3cret") + entry("jobs", "other", priority="bulk"))
    keys = source(file).read()
    web, jobs = keys.find(b"s3cret"), keys.find(b"other")
    assert web is not None
    assert jobs is not None
    assert (web.name, web.priority) == ("web", Priority.INTERACTIVE)
    assert (jobs.name, jobs.priority) == ("jobs", Priority.BULK)
    digest = hashlib.sha256(b"s3cret").hexdigest().encode()
    for wrong in (b"", b"S3cret", b"s3cre", b"s3cret ", b"\xff", digest):
        assert keys.find(wrong) is None
    assert keys.names == {"web", "jobs"}


def test_the_whole_digest_decides() -> None:
    """A digest that only shares its prefix with a key's digest does not find the key."""
    digest = hashlib.sha256(b"s3cret").digest()
    keys = KeySet([Key("web", digest[:-1] + bytes([digest[-1] ^ 1]), NO_LIMITS)])
    assert keys.find(b"s3cret") is None


def test_limits_are_the_keys_own_or_the_defaults(tmp_path: Path) -> None:
    """A limit in the file, including 0, overrides the default."""
    file = tmp_path / "keys.toml"
    file.write_text(entry("a", "a", requests_per_minute=5, concurrency=0) + entry("b", "b"))
    keys = source(file, "c=c", KeyLimits(60, 1000, 2)).read()
    found = {name: keys.find(name.encode()) for name in "abc"}
    assert {name: key and key.limits for name, key in found.items()} == {
        "a": KeyLimits(5, 1000, 0),
        "b": KeyLimits(60, 1000, 2),
        "c": KeyLimits(60, 1000, 2),
    }


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "[[keys]]"),
        ("keys = []", "[[keys]]"),
        ("keys = 3", "[[keys]]"),
        ("[[key]]\nname = 'a'", "[[keys]]"),
        (f"colour = 1\n{entry('a', 'a')}", "[[keys]]"),
        ("[[keys]]\nname = \n", "line 2"),
        ("\n\n[[keys]\n", "line 3"),
        ("keys = [1]", "entry 1"),
        (entry("a", "a") + "[[keys]]\nname = 'b'", "entry 2: sha256"),
        ("[[keys]]\nname = 'b'\nsha256 = 'tv-plain-secret'", "entry 1: sha256"),
        (entry("a", "a") + entry("b c", "b"), "entry 2: name"),
        (entry("none", "a"), "entry 1: name"),
        (entry("a", "a", plain="tv-plain-secret"), "entry 1: plain"),
        (entry("a", "a", concurrency=-1), "entry 1: concurrency"),
        (entry("a", "a", requests_per_minute=1.5), "entry 1: requests_per_minute"),
        (entry("a", "a", tokens_per_minute="9"), "entry 1: tokens_per_minute"),
        (entry("a", "a", priority="urgent"), "entry 1: priority"),
        (entry("a", "a") + entry("a", "b"), "name a"),
        (entry("a", "s") + entry("b", "s"), "a and b have the same secret"),
    ],
)
def test_an_error_in_the_file_names_the_entry(tmp_path: Path, content: str, named: str) -> None:
    """The message names the line or the entry, and never contains a secret."""
    file = tmp_path / "keys.toml"
    file.write_text(content)
    with pytest.raises(StartError) as refused:
        source(file).read()
    assert named in str(refused.value)
    assert "tv-plain-secret" not in str(refused.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """A missing file, a folder and a binary file are each rejected with their path."""
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    for file in (tmp_path / "missing", tmp_path, binary):
        with pytest.raises(StartError, match=str(file)):
            source(file).read()


def test_pairs_come_from_the_environment(tmp_path: Path) -> None:
    """The first = ends the name, so a secret may contain one; file and pairs are combined."""
    assert read_pairs("a=1, b=x=y= ,") == [("a", "1"), ("b", "x=y=")]
    file = tmp_path / "keys.toml"
    file.write_text(entry("web", "s3cret"))
    assert source(file, "a=1").read().names == {"web", "a"}
    with pytest.raises(StartError, match="name web"):
        source(file, "web=1").read()
    with pytest.raises(StartError, match="same secret"):
        source(file, "a=s3cret").read()


@pytest.mark.parametrize("text", ["hush", "a=", "=hush", "a b=hush", "none=hush", "a=hush\u00e9"])
def test_an_error_in_a_pair_names_its_number(text: str) -> None:
    """The message has the number of the pair and not its content."""
    with pytest.raises(ValueError, match="entry 2") as refused:
        read_pairs(f"ok=1,{text}")
    assert "hush" not in str(refused.value)


def test_a_key_never_shows_its_digest(tmp_path: Path) -> None:
    """Repr of a key, which may end up in a log, does not contain the digest."""
    file = tmp_path / "keys.toml"
    file.write_text(f"[[keys]]\nname = 'a'\nsha256 = '{DIGEST}'")
    (key,) = [source(file).read()._by_prefix[bytes.fromhex(DIGEST)[:8]]]
    assert "digest" not in repr(key)
    assert "name='a'" in repr(key)
