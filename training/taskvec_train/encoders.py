"""The student's backbone as an encoder, and encoders as models under evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.evaluation.formats import Matrix
from taskvec.evaluation.models import Advance
from taskvec_train.backbones import Model, last_states
from taskvec_train.batches import split_by_tokens
from taskvec_train.recipe import Prompts
from taskvec_train.teacher import Encoder, bfloat16_is_fast
from taskvec_train.tokens import tokens_of


@dataclass(frozen=True)
class BaseEncoder:
    """A backbone without an adapter: the teacher of a new adapter, or a student to evaluate."""

    model: Model
    base: Checkpoint
    device: torch.device

    @property
    def tokenizer(self) -> Path:
        return self.base.tokenizer

    @property
    def dimension(self) -> int:
        return self.base.backbone.hidden

    @property
    def limit(self) -> int:
        return self.base.card.max_tokens

    @torch.inference_mode()
    def embed(self, ids: NDArray[np.int64], lengths: NDArray[np.int64]) -> Tensor:
        """Return float32 unit vectors [texts, dimension] of ids padded on the right."""
        tokens, counts = (torch.from_numpy(array).to(self.device) for array in (ids, lengths))
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=bfloat16_is_fast(self.device)
        ):
            states = last_states(self.model, tokens, counts, causal=self.base.backbone.causal)
        return functional.normalize(states, dim=-1)


class EvaluatedEncoder:
    """An encoder with prompts for queries and documents; see ``evaluation.models.Model``."""

    def __init__(self, name: str, encoder: Encoder, prompts: Prompts, batch_tokens: int) -> None:
        """Wrap an encoder.

        Args:
            name: name of the model; its tasks are ``NAME.query`` and ``NAME.passage``.
            encoder: computes the vectors.
            prompts: put before queries and documents.
            batch_tokens: maximum number of tokens of a batch.
        """
        self.name = name
        self.dimension = encoder.dimension
        self.matryoshka: Sequence[int] = ()
        self.tasks: Sequence[str] = [f"{name}.query", f"{name}.passage"]
        self._encoder, self._prompts, self._batch_tokens = encoder, prompts, batch_tokens

    def embed(self, texts: Sequence[str], task: str, advance: Advance) -> Matrix:
        """Return unit vectors; see ``Model.embed``."""
        prompt = self._prompts.query if task.endswith(".query") else self._prompts.document
        prompted = [(prompt, text) for text in texts]
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        with TemporaryDirectory(prefix="taskvec-train-") as folder:
            encoder = self._encoder
            store = tokens_of(Path(folder), prompted, encoder.tokenizer, encoder.limit)
            rows = np.argsort(store.lengths, kind="stable")
            for batch in split_by_tokens(rows, store.lengths, self._batch_tokens):
                vectors[batch] = encoder.embed(*store.padded(batch)).cpu().numpy()
                advance(len(batch))
        return vectors
