"""The losses of jina-embeddings-v5 (arXiv 2602.15547), each a function of vectors.

All take float32 vectors and return a scalar. Vectors need not have length 1: a cosine normalises.
``z[:, :d]`` is a vector truncated to its first d values, as the service does.

The paper does not say how Matryoshka dimensions (Kusupati et al., arXiv 2205.13147) enter the
losses. Here each loss is computed at every nested dimension, on truncated vectors, and averaged:
``matryoshka``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional


def truncate(vectors: Tensor, dimension: int) -> Tensor:
    """Truncate vectors and scale them to length 1: [..., n] -> [..., dimension]."""
    return functional.normalize(vectors[..., :dimension], dim=-1)


def matryoshka(
    loss: Callable[[int], Tensor],
    dimensions: Sequence[int],
    weights: Sequence[float] | None = None,
) -> Tensor:
    """Average a loss over nested dimensions: ``sum_d w_d loss(d) / sum_d w_d``.

    Args:
        loss: the loss on vectors truncated to d values.
        dimensions: the values of d.
        weights: one for each dimension; None for equal weights.
    """
    weights = weights or [1.0] * len(dimensions)
    total = torch.stack([w * loss(d) for w, d in zip(weights, dimensions, strict=True)]).sum()
    return total / sum(weights)


def distillation(student: Tensor, projection: Tensor, teacher: Tensor) -> Tensor:
    """Return the embedding distillation loss: ``1/B sum_i [1 - cos(psi z_i, t_i)]``.

    From 2602.15547, stage 1. This is one side of a batch of pairs; the paper adds the two sides.

    Args:
        student: [B, d], truncated or full.
        projection: psi, [m, n] with n >= d: its first d columns act on truncated vectors.
        teacher: [B, m].
    """
    projected = student @ projection[:, : student.shape[1]].T
    return (1 - functional.cosine_similarity(projected, teacher, dim=-1)).mean()


def info_nce(
    anchors: Tensor, candidates: Tensor, temperature: float, ignored: Tensor | None = None
) -> Tensor:
    """Return InfoNCE.

    ``-1/B sum_i log S(x_i, y_i) / (S(x_i, y_i) + sum_n S(x_i, n))``, ``S = exp(cos / tau)``:
    van den Oord et al., arXiv 1807.03748, as in 2602.15547, stage 2.

    Args:
        anchors: x, [B, d].
        candidates: [N, d] with N >= B: row i is the positive of anchor i; all other rows are its
            negatives; rows from B on are hard negatives.
        temperature: tau.
        ignored: bool [B, N], True for false negatives; [i, i] must be False.
    """
    scores = (
        truncate(anchors, anchors.shape[1])
        @ truncate(candidates, candidates.shape[1]).T
        / temperature
    )
    if ignored is not None:
        scores = scores.masked_fill(ignored, -math.inf)
    return functional.cross_entropy(scores, torch.arange(len(anchors), device=scores.device))


def global_orthogonal(queries: Tensor, positives: Tensor) -> Tensor:
    """Return the global orthogonal regulariser (GOR).

    ``1/(B(B-1)) sum_{i!=j} (q_i . q_j)^2 + 1/(B(B-1)) sum_{i!=j} (p_i . p_j)^2``, after Zhang et
    al., arXiv 1708.06320, without its term for the mean, as in 2602.15547.

    Args:
        queries: q, [B, d], B >= 2.
        positives: p, [B, d].
    """
    return _mean_squared_cosine(queries) + _mean_squared_cosine(positives)


def _mean_squared_cosine(vectors: Tensor) -> Tensor:
    """Return the mean of squared cosines over all pairs of different rows."""
    count = len(vectors)
    unit = truncate(vectors, vectors.shape[1])
    squares = (unit @ unit.T).square()
    return (squares.sum() - squares.diagonal().sum()) / (count * (count - 1))


def cosent(first: Tensor, second: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """Return CoSENT: ``ln(1 + sum over s_i > s_j of exp((cos_j - cos_i) / tau'))``.

    Su, "CoSENT: a more effective sentence vector scheme than Sentence-BERT" (2022); 2602.15547
    misplaces the exponent.

    Args:
        first: one text of each pair, [B, d].
        second: the other, [B, d].
        scores: s, [B]: similarity of the two texts, in any unit.
        temperature: tau'.
    """
    cosines = functional.cosine_similarity(first, second, dim=-1) / temperature
    gaps = cosines[None, :] - cosines[:, None]
    ordered = scores[:, None] > scores[None, :]
    gaps = gaps.masked_fill(~ordered, -math.inf).flatten()
    return torch.logsumexp(torch.cat([gaps.new_zeros(1), gaps]), dim=0)


def bidirectional_info_nce(
    queries: Tensor, documents: Tensor, temperature: float, labels: Tensor | None = None
) -> Tensor:
    """Return the mean of InfoNCE from queries to all documents, and from positives to queries.

    ``1/2 [-1/B sum_i log S(q_i, d_i0) / sum_jk S(q_i, d_jk)
    - 1/B sum_i log S(q_i, d_i0) / sum_j S(q_j, d_i0)]``, S as in ``info_nce`` (2602.15547,
    classification: each query has a group of one positive and K negatives).

    Args:
        queries: q, [B, d].
        documents: [B, 1 + K, d], the positive first.
        temperature: tau.
        labels: of queries [B] and documents [B, 1 + K], stacked as [B, 2 + K]: documents with the
            query's label are not its negatives. None: all other documents are negatives.
    """
    positives = documents[:, 0]
    candidates = torch.cat([positives, documents[:, 1:].flatten(0, 1)])
    query_mask, document_mask = None, None
    if labels is not None:
        of_query, of_documents = labels[:, 0], labels[:, 1:]
        same = of_query[:, None] == torch.cat([of_documents[:, 0], of_documents[:, 1:].flatten()])
        query_mask = _without_own(same)
        document_mask = _without_own(of_documents[:, 0][:, None] == of_query)
    forward = info_nce(queries, candidates, temperature, query_mask)
    return (forward + info_nce(positives, queries, temperature, document_mask)) / 2


def _without_own(same: Tensor) -> Tensor:
    """Return ``same`` with False for each row's own positive."""
    own = torch.eye(len(same), same.shape[1], dtype=torch.bool, device=same.device)
    return same & ~own


def relational(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the relational distillation loss.

    ``1/M^2 sum_ij ((1 - cos(s_i, s_j))/mu_S - (1 - cos(t_i, t_j))/mu_T)^2``, where mu is the mean
    of each matrix of distances: Park et al., arXiv 1904.05068, as in 2602.15547.

    Args:
        student: s, [M, d], M >= 2.
        teacher: t, [M, m]; no gradient flows to it.
    """
    own, given = _relative_distances(student), _relative_distances(teacher.detach())
    return (own - given).square().mean()


def _relative_distances(vectors: Tensor) -> Tensor:
    unit = truncate(vectors, vectors.shape[1])
    distances = 1 - unit @ unit.T
    return distances / distances.mean().clamp_min(1e-6)  # identical texts have distances of 0


def similarity(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the similarity loss: ``1/M^2 sum_ij (cos(s_i, s_j) - cos(t_i, t_j))^2``.

    An addition to the paper.

    Args:
        student: s, [M, d].
        teacher: t, [M, m]; no gradient flows to it.
    """
    own, given = truncate(student, student.shape[1]), truncate(teacher.detach(), teacher.shape[1])
    return (own @ own.T - given @ given.T).square().mean()
