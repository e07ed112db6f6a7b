"""The tokenizers that the tests of core run on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from qwen import qwen_tokenizer_file
from taskvec.checkpoint.checkpoint import Checkpoint
from tokenizing import forget_tokenizers

END = ("<|endoftext|>", 151_643)


@pytest.fixture(scope="session")
def qwen_tokenizer() -> Path:
    """Qwen3's tokenizer.json as it is: nothing is put before or after a text."""
    return qwen_tokenizer_file()


@pytest.fixture(scope="module", params=["wordpiece", "qwen", "qwen with an end"])
def file(
    request: pytest.FixtureRequest,
    default_checkpoint: Checkpoint,
    qwen_tokenizer: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Path]:
    """The default model's (which appends [SEP]), Qwen3's, and Qwen3's with a last token."""
    if request.param == "wordpiece":
        yield default_checkpoint.tokenizer
    elif request.param == "qwen":
        yield qwen_tokenizer
    else:
        yield with_end(qwen_tokenizer, tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")
    forget_tokenizers()


def with_end(file: Path, copy: Path) -> Path:
    """Write a tokenizer that appends a token to each text, and return the file."""
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.post_processor = TemplateProcessing(
        single=f"$A {END[0]}", pair=f"$A {END[0]} $B {END[0]}", special_tokens=[END]
    )
    tokenizer.save(str(copy))
    return copy
