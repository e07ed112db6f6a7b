"""From a checkpoint to the parts of core that it decides."""

from __future__ import annotations

import os

from taskvec.checkpoint.layout import Checkpoint
from taskvec.core.tasks import TaskTable
from taskvec.core.tokens import TextTokenizer


def task_table(checkpoint: Checkpoint) -> TaskTable:
    """The tasks that a checkpoint offers."""
    return TaskTable(checkpoint.card.adapters, checkpoint.prompts, checkpoint.default_prompt)


def text_tokenizer(checkpoint: Checkpoint, *, max_tokens: int, threads: int) -> TextTokenizer:
    """A checkpoint's tokenizer.

    Args:
        checkpoint: whose.
        max_tokens: 0 for the model's own limit.
        threads: 0 for one per core, at most 4.
    """
    card = checkpoint.card
    return TextTokenizer(
        checkpoint.tokenizer,
        max_tokens=min(max_tokens or card.max_tokens, card.max_tokens),
        vocabulary=card.vocabulary,
        threads=threads or min(4, os.cpu_count() or 1),
    )
