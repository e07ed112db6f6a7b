"""What a training step computes: a batch in, one loss and its parts out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from peft import PeftModel
from torch import Tensor, nn

from taskvec_train import losses
from taskvec_train.backbones import Model, last_states
from taskvec_train.tokens import MULTIPLE

Batch = Mapping[str, Tensor]
Parts = dict[str, Tensor]
Weights = Mapping[str, float]


class Objective(nn.Module):
    """A student, its projection, and the weighted losses of one stage.

    Attributes:
        parts: the losses that it may report.
    """

    parts: ClassVar[tuple[str, ...]] = ()

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
        """Wire a stage.

        Args:
            student: a backbone, or a LoRA around a frozen one.
            projection: psi, [teacher, hidden].
            causal: of the backbone.
            dimensions: the nested ones that are trained.
            weights: loss -> weight; what is missing or zero is not computed.
            bfloat16: multiply in bfloat16 (the losses always in float32).
        """
        super().__init__()
        unknown = sorted(set(weights) - set(self.parts))
        if unknown:
            raise ValueError(f"{type(self).__name__} has no losses {unknown}.")
        self.student = student
        self.projection = projection
        self._causal = causal
        self._dimensions = dimensions
        self._weights = {name: weight for name, weight in weights.items() if weight}
        self._bfloat16 = bfloat16

    def embed(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Float32 vectors [texts, hidden], not normalised.

        Texts of about one length go through the student together: one long text among many short
        ones, as a mined negative may be, would have all of them padded to its length.
        """
        groups = alike(lengths)
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self._bfloat16):
            parts = [
                last_states(self.student, ids[rows, :width], lengths[rows], causal=self._causal)
                for rows, width in groups
            ]
        vectors: Tensor = torch.cat(parts)[torch.cat([rows for rows, _ in groups]).argsort()]
        return vectors

    def forward(self, batch: Batch) -> tuple[Tensor, Parts]:
        """The weighted sum, and each loss before it is weighted."""
        parts = {
            name: losses.matryoshka(loss, self._dimensions)
            for name, loss in self.losses(batch).items()
        }
        total = torch.stack([self._weights[name] * part for name, part in parts.items()]).sum()
        return total, {name: part.detach() for name, part in parts.items()}

    def losses(self, batch: Batch) -> dict[str, Callable[[int], Tensor]]:
        """Each loss that has a weight, as a function of the dimension."""
        raise NotImplementedError

    def wants(self, name: str) -> bool:
        """Whether a loss has a weight."""
        return name in self._weights

    def distilled(self, vectors: Tensor, teacher: Tensor) -> Callable[[int], Tensor]:
        """Embedding distillation as a function of the dimension."""
        return lambda d: losses.distillation(vectors[:, :d], self.projection, teacher)


def alike(lengths: Tensor) -> list[tuple[Tensor, int]]:
    """Rows whose lengths lie between one power of two and the next, and the width they need.

    Args:
        lengths: tokens of each text, [texts].

    Returns:
        Rows [n] and a multiple of ``MULTIPLE`` for each group, the shortest first.
    """
    classes = lengths.clamp_min(MULTIPLE).double().log2().ceil()
    groups = []
    for one in torch.unique(classes).tolist():
        (rows,) = torch.nonzero(classes == one, as_tuple=True)
        longest = int(lengths[rows].max())
        groups.append((rows, -(-longest // MULTIPLE) * MULTIPLE))
    return groups


class Distillation(Objective):
    """Stage 1, and the clustering adapter: follow the teacher's vectors.

    ``similarity`` is an addition to the paper: the two matrices of cosines are held together, too.
    """

    parts: ClassVar[tuple[str, ...]] = ("distill", "similarity")

    def losses(self, batch: Batch) -> dict[str, Callable[[int], Tensor]]:
        z, teacher = self.embed(batch["ids"], batch["lengths"]), batch["teacher"]
        chosen = {}
        if self.wants("distill"):
            chosen["distill"] = self.distilled(z, teacher)
        if self.wants("similarity"):
            chosen["similarity"] = lambda d: losses.similarity(z[:, :d], teacher)
        return chosen


class Retrieval(Objective):
    """InfoNCE with in-batch and mined negatives, distillation of both sides, GOR."""

    parts: ClassVar[tuple[str, ...]] = ("infonce", "distill", "gor")

    def __init__(self, *args: object, temperature: float, **options: object) -> None:
        """As ``Objective``, with InfoNCE's temperature."""
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self._temperature = temperature

    def losses(self, batch: Batch) -> dict[str, Callable[[int], Tensor]]:
        x = self.embed(batch["anchor_ids"], batch["anchor_lengths"])
        y = self.embed(batch["candidate_ids"], batch["candidate_lengths"])
        return self.contrast(x, y, batch)

    def contrast(self, x: Tensor, y: Tensor, batch: Batch) -> dict[str, Callable[[int], Tensor]]:
        """The losses of anchors and candidates; the first candidates are the positives."""
        positives = y[: len(x)]
        chosen: dict[str, Callable[[int], Tensor]] = {}
        if self.wants("infonce"):
            chosen["infonce"] = lambda d: losses.info_nce(
                losses.cut(x, d), losses.cut(y, d), self._temperature, batch["ignored"]
            )
        if self.wants("distill"):
            first = self.distilled(x, batch["anchor_teacher"])
            second = self.distilled(positives, batch["positive_teacher"])
            chosen["distill"] = lambda d: first(d) + second(d)
        if self.wants("gor"):
            chosen["gor"] = lambda d: losses.global_orthogonal(
                losses.cut(x, d), losses.cut(positives, d)
            )
        return chosen


class TextMatching(Retrieval):
    """CoSENT where a batch has scores, InfoNCE and distillation where it has pairs."""

    parts: ClassVar[tuple[str, ...]] = ("cosent", "infonce", "distill", "gor")

    def __init__(self, *args: object, score_temperature: float, **options: object) -> None:
        """As ``Retrieval``, with CoSENT's temperature."""
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
    """Bidirectional InfoNCE over groups, and the relations that the base sees among the texts."""

    parts: ClassVar[tuple[str, ...]] = ("infonce", "relational")

    def __init__(self, *args: object, temperature: float, **options: object) -> None:
        """As ``Objective``, with InfoNCE's temperature."""
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self._temperature = temperature

    def losses(self, batch: Batch) -> dict[str, Callable[[int], Tensor]]:
        queries, labels = len(batch["labels"]), batch["labels"]
        z = self.embed(batch["ids"], batch["lengths"])
        x, documents = z[:queries], z[queries:].reshape(queries, -1, z.shape[1])
        chosen: dict[str, Callable[[int], Tensor]] = {}
        if self.wants("infonce"):
            chosen["infonce"] = lambda d: losses.bidirectional_info_nce(
                losses.cut(x, d), losses.cut(documents, d), self._temperature, labels
            )
        if self.wants("relational") and isinstance(self.student, PeftModel):
            with torch.no_grad(), self.student.disable_adapter():
                base = self.embed(batch["ids"], batch["lengths"])
            chosen["relational"] = lambda d: losses.relational(z[:, :d], base)
        return chosen
