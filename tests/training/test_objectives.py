"""Embedding of a batch by an objective."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from taskvec.checkpoint.backbone import Backbone
from taskvec_train.backbones import new_backbone
from taskvec_train.objectives import Distillation, group_by_length
from taskvec_train.tokens import PAD_MULTIPLE

LENGTHS = [3, 100, 16, 17, 1, 33, 128, 64, 5]


def test_texts_of_a_group_have_similar_lengths() -> None:
    """No text is padded to twice its length, apart from rounding to the pad multiple."""
    lengths = torch.tensor(LENGTHS)
    groups = group_by_length(lengths)
    assert sorted(row for rows, _ in groups for row in rows.tolist()) == list(range(len(LENGTHS)))
    for rows, width in groups:
        assert width % PAD_MULTIPLE == 0
        assert lengths[rows].max() <= width < lengths[rows].max() + PAD_MULTIPLE
        assert width < 2 * lengths[rows].clamp_min(PAD_MULTIPLE).min() + PAD_MULTIPLE


@pytest.mark.parametrize("causal", [True, False])
def test_a_vector_does_not_depend_on_the_texts_beside_it(*, causal: bool) -> None:
    """Each text of a mixed batch has the vector that it has alone, in its own row."""
    kind = "qwen3" if causal else "eurobert"
    shape = Backbone(kind, 50, 32, 2, 2, 2, 16, 48, 1e-6, 1e4, 128, causal=causal, qk_norm=causal)
    torch.manual_seed(0)
    objective = Distillation(
        new_backbone(shape),
        nn.Parameter(torch.randn(48, 32)),
        causal=causal,
        dimensions=[16, 32],
        weights={"distill": 1.0},
        bfloat16=False,
    )
    ids, lengths = torch.randint(50, (len(LENGTHS), 128)), torch.tensor(LENGTHS)
    with torch.no_grad():
        together = objective.embed(ids, lengths)
        for i, length in enumerate(LENGTHS):
            alone = objective.embed(ids[i : i + 1, :length], lengths[i : i + 1])
            assert torch.allclose(together[i], alone[0], atol=1e-5)
