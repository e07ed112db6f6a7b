"""The student's tokenizer: the teacher's WordPiece vocabulary, trimmed to the corpus."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from taskvec_train.errors import TrainingError

END = "[SEP]"
"""Token that is appended to every text; its final state is the embedding."""

_CHUNK = 8192


def trimmed_tokenizer(file: Path, texts: Iterable[str], min_count: int) -> dict[str, Any]:
    """Return a tokenizer.json with only the pieces that texts use, in their order, with new ids.

    Special tokens and single characters, with their continuations, are kept, so that any word of
    known characters can still be tokenised.

    Args:
        file: a WordPiece tokenizer.json.
        texts: the corpus, prompts included.
        min_count: minimum number of occurrences of a piece.

    Raises:
        TrainingError: it is not a WordPiece tokenizer, or has no [SEP].
    """
    config: dict[str, Any] = json.loads(file.read_text())
    model = config["model"]
    if model.get("type") != "WordPiece":
        raise TrainingError(
            f"{file} is a {model.get('type')} tokenizer: only WordPiece vocabularies can be "
            "trimmed; use a pretrained student (student.base) instead."
        )
    old: dict[str, int] = model["vocab"]
    counts = _counts(Tokenizer.from_file(str(file)), texts, max(old.values()) + 1)
    special = {token["content"] for token in config["added_tokens"]}
    if END not in special:
        raise TrainingError(f"{file} has no special token {END}, whose state the student pools.")
    mark = model.get("continuing_subword_prefix", "##")
    kept = [
        piece
        for piece, number in sorted(old.items(), key=lambda item: item[1])
        if piece in special or (counts[number] >= min_count) or len(piece.removeprefix(mark)) == 1
    ]
    new = {piece: number for number, piece in enumerate(kept)}
    model["vocab"] = new
    config["added_tokens"] = [
        token | {"id": new[token["content"]]} for token in config["added_tokens"]
    ]
    config["post_processor"] = _appending(END, new[END])
    config["truncation"] = config["padding"] = None
    return config


def _counts(tokenizer: Tokenizer, texts: Iterable[str], size: int) -> np.ndarray[Any, Any]:
    counts = np.zeros(size, dtype=np.int64)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    for chunk in _chunks(texts):
        for encoded in tokenizer.encode_batch_fast(chunk, add_special_tokens=False):
            counts += np.bincount(encoded.ids, minlength=size) if encoded.ids else 0
    return counts


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    for text in texts:
        chunk.append(text)
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _appending(token: str, number: int) -> dict[str, Any]:
    def template(names: str) -> list[dict[str, Any]]:
        pieces: list[dict[str, Any]] = []
        for name in names:
            pieces.append({"Sequence": {"id": name, "type_id": 0}})
            pieces.append({"SpecialToken": {"id": token, "type_id": 0}})
        return pieces

    return {
        "type": "TemplateProcessing",
        "single": template("A"),
        "pair": template("AB"),
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }
