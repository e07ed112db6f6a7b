"""Every loss and its gradients equal its formula, computed with plain loops in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from taskvec_train import losses

Array = NDArray[np.float64]
B, N, D, M = 4, 9, 6, 5


def numbers(*shape: int, seed: int = 0) -> Array:
    """Return random numbers."""
    return np.random.default_rng(seed).normal(size=shape)


def cos(a: Array, b: Array) -> float:
    """Return the cosine, computed with loops."""
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    length_a = math.sqrt(sum(float(x) ** 2 for x in a))
    length_b = math.sqrt(sum(float(y) ** 2 for y in b))
    return dot / (length_a * length_b)


def check(
    loss: Callable[..., torch.Tensor], reference: Callable[..., float], *inputs: Array
) -> None:
    """Check the value against the loops, and every gradient against finite differences."""
    tensors = [torch.tensor(value, requires_grad=True) for value in inputs]
    value = loss(*tensors)
    assert value.item() == pytest.approx(reference(*inputs), abs=1e-10)
    gradients = torch.autograd.grad(value, tensors)
    for which, gradient in enumerate(gradients):
        for index in np.ndindex(*inputs[which].shape):
            step = 1e-5
            sides = []
            for sign in (1, -1):
                moved = [value.copy() for value in inputs]
                moved[which][index] += sign * step
                sides.append(reference(*moved))
            difference = (sides[0] - sides[1]) / (2 * step)
            assert gradient[index].item() == pytest.approx(difference, abs=1e-6, rel=1e-5)


@pytest.mark.parametrize("width", [D, 3])
def test_distillation_is_one_minus_the_cosine_through_the_projection(width: int) -> None:
    """It is the mean of 1 - cos(psi z, t); a truncated z uses psi's first columns."""
    teacher = numbers(B, M, seed=2)

    def reference(z: Array, psi: Array) -> float:
        total = 0.0
        for i in range(B):
            mapped = np.array([sum(psi[r, c] * z[i, c] for c in range(width)) for r in range(M)])
            total += 1 - cos(mapped, teacher[i])
        return total / B

    def loss(z: torch.Tensor, psi: torch.Tensor) -> torch.Tensor:
        return losses.distillation(z[:, :width], psi, torch.tensor(teacher))

    check(loss, reference, numbers(B, D), numbers(M, D, seed=1))


def nce(x: Array, y: Array, tau: float, ignored: Array) -> float:
    """Return InfoNCE, computed with loops; the positive of x[i] is y[i]."""
    total = 0.0
    for i in range(len(x)):
        below = sum(
            math.exp(cos(x[i], y[j]) / tau) for j in range(len(y)) if j == i or not ignored[i, j]
        )
        total -= math.log(math.exp(cos(x[i], y[i]) / tau) / below)
    return total / len(x)


@pytest.mark.parametrize("hard", [0, N - B])
@pytest.mark.parametrize("masked", [False, True])
def test_info_nce(hard: int, masked: bool) -> None:
    """It uses in-batch and hard negatives, and ignores masked false negatives."""
    ignored = np.zeros((B, B + hard), dtype=bool)
    if masked:
        ignored[0, 2] = ignored[3, 1] = ignored[2, B + hard - 1] = True
        np.fill_diagonal(ignored, val=False)
    mask = torch.tensor(ignored) if masked else None
    check(
        lambda x, y: losses.info_nce(x, y, 0.3, mask),
        lambda x, y: nce(x, y, 0.3, ignored),
        numbers(B, D),
        numbers(B + hard, D, seed=1),
    )


def test_global_orthogonal_regularisation() -> None:
    """It is the mean squared cosine among different queries, plus that among positives."""

    def reference(q: Array, p: Array) -> float:
        total = 0.0
        for side in (q, p):
            for i in range(B):
                for j in range(B):
                    if i != j:
                        total += cos(side[i], side[j]) ** 2 / (B * (B - 1))
        return total

    check(losses.global_orthogonal, reference, numbers(B, D), numbers(B, D, seed=1))


def test_cosent() -> None:
    """It penalises cosines in another order than the scores; ties do not count."""
    scores = [0.1, 0.9, 0.5, 0.5]

    def reference(a: Array, b: Array) -> float:
        total = 1.0
        for i in range(B):
            for j in range(B):
                if scores[i] > scores[j]:
                    total += math.exp((cos(a[j], b[j]) - cos(a[i], b[i])) / 0.2)
        return math.log(total)

    check(
        lambda a, b: losses.cosent(a, b, torch.tensor(scores), 0.2),
        reference,
        numbers(B, D),
        numbers(B, D, seed=1),
    )


@pytest.mark.parametrize("labelled", [False, True])
def test_bidirectional_info_nce(labelled: bool) -> None:
    """It is InfoNCE in both directions; texts of the same label are not negatives."""
    classes = np.array([[0, 0, 1, 2], [1, 1, 0, 2], [0, 0, 2, 1], [2, 2, 0, 1]])

    def reference(q: Array, documents: Array) -> float:
        rest = [(i, k) for i in range(B) for k in range(1, 3)]
        flat = np.stack([*documents[:, 0], *(documents[i, k] for i, k in rest)])
        ignored = np.zeros((B, len(flat)), dtype=bool)
        ignored_back = np.zeros((B, B), dtype=bool)
        if labelled:
            of_flat = [*classes[:, 1], *(classes[i, 1 + k] for i, k in rest)]
            for i in range(B):
                for j, label in enumerate(of_flat):
                    ignored[i, j] = label == classes[i, 0]
                for j in range(B):
                    ignored_back[i, j] = classes[i, 1] == classes[j, 0]
        forth = nce(q, flat, 0.3, ignored)
        return (forth + nce(documents[:, 0], q, 0.3, ignored_back)) / 2

    labels = torch.tensor(classes) if labelled else None
    check(
        lambda q, d: losses.bidirectional_info_nce(q, d, 0.3, labels),
        reference,
        numbers(B, D),
        numbers(B, 3, D, seed=1),
    )


def test_relational_distillation() -> None:
    """It compares distances among vectors, relative to their mean, with the teacher's."""
    teacher = numbers(B, M, seed=2)

    def distances(vectors: Array) -> list[list[float]]:
        rows = [[1 - cos(vectors[i], vectors[j]) for j in range(B)] for i in range(B)]
        mean = sum(map(sum, rows)) / B**2
        return [[value / mean for value in row] for row in rows]

    def reference(s: Array) -> float:
        own, given = distances(s), distances(teacher)
        return sum((own[i][j] - given[i][j]) ** 2 for i in range(B) for j in range(B)) / B**2

    check(lambda s: losses.relational(s, torch.tensor(teacher)), reference, numbers(B, D))


def test_similarity() -> None:
    """It is the mean squared difference of the two matrices of cosines."""
    teacher = numbers(B, M, seed=2)

    def reference(s: Array) -> float:
        pairs = [(i, j) for i in range(B) for j in range(B)]
        return sum((cos(s[i], s[j]) - cos(teacher[i], teacher[j])) ** 2 for i, j in pairs) / B**2

    check(lambda s: losses.similarity(s, torch.tensor(teacher)), reference, numbers(B, D))


def test_matryoshka_is_the_weighted_mean_over_nested_dimensions() -> None:
    """It is the weighted mean of the loss over truncated vectors."""
    hard = np.zeros((B, B), dtype=bool)

    def reference(x: Array, y: Array) -> float:
        parts = [nce(x[:, :d], y[:, :d], 0.5, hard) for d in (2, 4, D)]
        return (3 * parts[0] + parts[1] + parts[2]) / 5

    check(
        lambda x, y: losses.matryoshka(
            lambda d: losses.info_nce(losses.truncate(x, d), losses.truncate(y, d), 0.5),
            (2, 4, D),
            (3, 1, 1),
        ),
        reference,
        numbers(B, D),
        numbers(B, D, seed=1),
    )


def test_identical_texts_give_finite_losses_and_gradients() -> None:
    """A batch of identical texts, which real data has, gives finite losses and gradients."""
    same = torch.ones(B, D, requires_grad=True)
    total = (
        losses.relational(same, torch.ones(B, M))
        + losses.global_orthogonal(same, same)
        + losses.info_nce(same, same, 0.02)
        + losses.cosent(same, same, torch.ones(B), 0.05)
    )
    (gradient,) = torch.autograd.grad(total, same)
    assert torch.isfinite(total)
    assert torch.isfinite(gradient).all()
