"""Divergences of tokens: the formulas in float64, TRL's numbers, and their gradients."""

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from peftcore.train import divergence, token_divergences

KINDS = ("forward_kl", "reverse_kl", "jsd")


def logits(tokens: int = 7, vocabulary: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64) for _ in "ab")
    return student.requires_grad_(), teacher


def by_hand(student: list[float], teacher: list[float], kind: str, temperature: float, beta: float) -> float:
    def softmax(values: list[float]) -> list[float]:
        exponentials = [math.exp(value / temperature) for value in values]
        return [one / sum(exponentials) for one in exponentials]

    def kl(p: list[float], q: list[float]) -> float:
        return sum(one * math.log(one / other) for one, other in zip(p, q, strict=True))

    q, p = softmax(student), softmax(teacher)
    if kind == "jsd":
        m = [beta * one + (1 - beta) * other for one, other in zip(p, q, strict=True)]
        return beta * kl(p, m) + (1 - beta) * kl(q, m)
    return kl(p, q) if kind == "forward_kl" else kl(q, p)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergences_are_the_formulas(kind: Any, temperature: float) -> None:
    student, teacher = logits()
    found = token_divergences(student, teacher, kind, temperature, beta=0.3)
    expected = [
        by_hand(one, other, kind, temperature, 0.3)
        for one, other in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-10)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # TRL's own, at its import
@pytest.mark.parametrize(("kind", "beta"), [("forward_kl", 0.0), ("reverse_kl", 1.0), ("jsd", 0.3)])
def test_divergences_and_gradients_are_trls(kind: Any, beta: float) -> None:
    from trl.experimental.gkd import GKDTrainer

    student, teacher = logits()
    theirs = GKDTrainer.generalized_jsd_loss(student[None], teacher[None], beta=beta, temperature=1.7, reduction="sum")
    (expected,) = torch.autograd.grad(theirs, student)
    ours = token_divergences(student, teacher, kind, 1.7, beta or 0.5).sum()
    (gradient,) = torch.autograd.grad(ours, student)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_change_nothing_and_gradients_are_those_of_finite_differences(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = logits()
    whole = token_divergences(student, teacher, kind)
    monkeypatch.setattr(divergence, "CHUNK", 3)
    torch.testing.assert_close(token_divergences(student, teacher, kind), whole)
    assert torch.autograd.gradcheck(lambda values: token_divergences(values, teacher, kind), (student,))


@pytest.mark.parametrize("kind", KINDS)
def test_equal_models_have_no_divergence_and_padded_vocabularies_are_cut(kind: Any) -> None:
    student, _ = logits()
    padded = F.pad(student.detach(), (0, 5), value=3.0)
    assert token_divergences(student, padded, kind).abs().max() < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_that_a_model_rules_out_adds_nothing(kind: Any) -> None:
    student, teacher = logits()
    student = student.detach().clone()
    student[:, 2] = teacher[:, 2] = -math.inf
    found = token_divergences(student, teacher, kind)
    kept = [column for column in range(11) if column != 2]
    torch.testing.assert_close(found, token_divergences(student[:, kept], teacher[:, kept], kind))
