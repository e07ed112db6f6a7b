"""Training objectives: a batch in, the weighted loss and each of its terms out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from peft import PeftModel
from torch import Tensor, nn

from taskvec_train import losses
from taskvec_train.backbones import Model, last_states
from taskvec_train.tokens import PAD_MULTIPLE

Batch = Mapping[str, Tensor]
Terms = dict[str, Tensor]
Weights = Mapping[str, float]


class Objective(nn.Module):
    """A student, its projection, and the weighted losses of one stage.

    Attributes:
        loss_names: the losses that this objective can compute.
    """

    loss_names: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        student: Model | PeftModel,
        projection: nn.Parameter,
        *,
        causal: bool,
        dimensions: Sequence[int],
        weights: Weights,
        bfloat16: bool,
    ) -> None:
        """Combine a student with losses.

        Args:
            student: a backbone, or a PEFT model around a frozen backbone.
            projection: psi, [teacher dimension, hidden].
            causal: True if the backbone's attention is causal.
            dimensions: the Matryoshka dimensions.
            weights: loss name -> weight; losses without a weight or with 0 are not computed.
            bfloat16: True for matrix products in bfloat16; losses are always in float32.

        Raises:
            ValueError: a weight for an unknown loss.
        """
        super().__init__()
        unknown = sorted(set(weights) - set(self.loss_names))
        if unknown:
            raise ValueError(f"{type(self).__name__} has no losses {unknown}.")
        self.student = student
        self.projection = projection
        self._causal = causal
        self._dimensions = dimensions
        self._weights = {name: weight for name, weight in weights.items() if weight}
        self._bfloat16 = bfloat16

    def embed(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Return float32 vectors [texts, hidden], not normalised.

        Texts of similar length are embedded together: one long text among many short ones, such
        as a mined negative, would pad all of them to its length.

        Args:
            ids: int64 [texts, length], padded on the right.
            lengths: int64 [texts].
        """
        groups = group_by_length(lengths)
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self._bfloat16):
            vectors = [
                last_states(self.student, ids[rows, :width], lengths[rows], causal=self._causal)
                for rows, width in groups
            ]
        ordered: Tensor = torch.cat(vectors)[torch.cat([rows for rows, _ in groups]).argsort()]
        return ordered

    def forward(self, batch: Batch) -> tuple[Tensor, Terms]:
        """Return the weighted sum of the losses, and each loss before weighting."""
        terms = {
            name: losses.matryoshka(loss, self._dimensions)
            for name, loss in self.losses(batch).items()
        }
        total = torch.stack([self._weights[name] * term for name, term in terms.items()]).sum()
        return total, {name: term.detach() for name, term in terms.items()}

    def losses(self, batch: Batch) -> dict[str, Callable[[int], Tensor]]:
        """Return each loss that has a weight, as a function of the dimension."""
        raise NotImplementedError

    def has_loss(self, name: str) -> bool:
        """Return whether a loss has a weight."""
        return name in self._weights

    def distilled(self, vectors: Tensor, teacher: Tensor) -> Callable[[int], Tensor]:
        """Return the embedding distillation loss as a function of the dimension."""
        return lambda d: losses.distillation(vectors[:, :d], self.projection, teacher)


def group_by_length(lengths: Tensor) -> list[tuple[Tensor, int]]:
    """Group texts whose lengths lie between one power of two and the next.

    Args:
        lengths: int64 [texts], tokens of each text.

    Returns:
        For each group, shortest texts first: its rows, int64 [n], and its padded length, a
        multiple of ``PAD_MULTIPLE``.
    """
    classes = lengths.clamp_min(PAD_MULTIPLE).double().log2().ceil()
    groups = []
    for length_class in torch.unique(classes).tolist():
        (rows,) = torch.nonzero(classes == length_class, as_tuple=True)
        longest = int(lengths[rows].max())
        groups.append((rows, -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE))
    return groups


class Distillation(Objective):
    """Stage 1 and the clustering adapter: match the teacher's vectors.

    ``similarity`` is an addition to the paper: it also matches the matrices of cosines.
    """

    loss_names: ClassVar[tuple[str, ...]] = ("distill", "similarity")

    def losses(self, batch: Batch) -> dict[str, Callable[[int], Tensor]]:
        z, teacher = self.embed(batch["ids"], batch["lengths"]), batch["teacher"]
        chosen = {}
        if self.has_loss("distill"):
            chosen["distill"] = self.distilled(z, teacher)
        if self.has_loss("similarity"):
            chosen["similarity"] = lambda d: losses.similarity(z[:, :d], teacher)
        return chosen


class Retrieval(Objective):
    """InfoNCE with in-batch and mined negatives, distillation of both sides, GOR."""

    loss_names: ClassVar[tuple[str, ...]] = ("infonce", "distill", "gor")

    def __init__(self, *args: object, temperature: float, **options: object) -> None:
        """Add InfoNCE's temperature to the arguments of ``Objective``."""
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self._temperature = temperature

    def losses(self, batch: Batch) -> dict[str, Callable[[int], Tensor]]:
        x = self.embed(batch["anchor_ids"], batch["anchor_lengths"])
        y = self.embed(batch["candidate_ids"], batch["candidate_lengths"])
        return self.contrast(x, y, batch)

    def contrast(self, x: Tensor, y: Tensor, batch: Batch) -> dict[str, Callable[[int], Tensor]]:
        """Return the losses of anchors and candidates; the first candidates are the positives."""
        positives = y[: len(x)]
        chosen: dict[str, Callable[[int], Tensor]] = {}
        if self.has_loss("infonce"):
            chosen["infonce"] = lambda d: losses.info_nce(
                losses.truncate(x, d), losses.truncate(y, d), self._temperature, batch["ignored"]
            )
        if self.has_loss("distill"):
            first = self.distilled(x, batch["anchor_teacher"])
            second = self.distilled(positives, batch["positive_teacher"])
            chosen["distill"] = lambda d: first(d) + second(d)
        if self.has_loss("gor"):
            chosen["gor"] = lambda d: losses.global_orthogonal(
                losses.truncate(x, d), losses.truncate(positives, d)
            )
        return chosen


class TextMatching(Retrieval):
    """CoSENT for batches with scores, InfoNCE and distillation for batches of pairs."""

    loss_names: ClassVar[tuple[str, ...]] = ("cosent", "infonce", "distill", "gor")

    def __init__(self, *args: object, score_temperature: float, **options: object) -> None:
        """Add CoSENT's temperature to the arguments of ``Retrieval``."""
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self._score_temperature = score_temperature

    def losses(self, batch: Batch) -> dict[str, Callable[[int], Tensor]]:
        if "scores" not in batch:
            return super().losses(batch)
        a = self.embed(batch["a_ids"], batch["a_lengths"])
        b = self.embed(batch["b_ids"], batch["b_lengths"])
        return {
            "cosent": lambda d: losses.cosent(
                a[:, :d], b[:, :d], batch["scores"], self._score_temperature
            )
        }


class Classification(Objective):
    """Bidirectional InfoNCE over groups, and relational distillation from the base model."""

    loss_names: ClassVar[tuple[str, ...]] = ("infonce", "relational")

    def __init__(self, *args: object, temperature: float, **options: object) -> None:
        """Add InfoNCE's temperature to the arguments of ``Objective``."""
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self._temperature = temperature

    def losses(self, batch: Batch) -> dict[str, Callable[[int], Tensor]]:
        queries, labels = len(batch["labels"]), batch["labels"]
        z = self.embed(batch["ids"], batch["lengths"])
        x, documents = z[:queries], z[queries:].reshape(queries, -1, z.shape[1])
        chosen: dict[str, Callable[[int], Tensor]] = {}
        if self.has_loss("infonce"):
            chosen["infonce"] = lambda d: losses.bidirectional_info_nce(
                losses.truncate(x, d), losses.truncate(documents, d), self._temperature, labels
            )
        if self.has_loss("relational") and isinstance(self.student, PeftModel):
            with torch.no_grad(), self.student.disable_adapter():
                base = self.embed(batch["ids"], batch["lengths"])
            chosen["relational"] = lambda d: losses.relational(z[:, :d], base)
        return chosen
