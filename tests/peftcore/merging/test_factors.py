"""What is done on factors is what dense linear algebra gives."""

from typing import Any

import pytest
import torch
from torch import Tensor

from peftcore.kernels.low_rank import Factors
from peftcore.merging import Recipe, factors
from peftcore.merging.factors import inner, padded, reduced, reduced_dense, stacked

SIZES = [(1, 30, 20, 6), (1, 20, 30, 6), (1, 8, 12, 20), (3, 9, 14, 5), (1, 5, 40, 5)]
"""Experts, outputs, inputs, rank."""


def random_factors(e: int, o: int, i: int, r: int, scaling: float = 0.7) -> Factors:
    torch.manual_seed(e + o + i + r)
    return Factors(torch.randn(e, r, i).double(), torch.randn(e, o, r).double(), scaling)


def best(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation by PyTorch's SVD of the whole matrix, and the squared singular values it leaves out."""
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :], s[..., rank:].square().sum()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_svd_on_factors_is_the_svd_of_the_dense_change(size: tuple[int, int, int, int], rank: int) -> None:
    change = random_factors(*size)
    expected, lost = best(change.dense(), rank)
    for found in (reduced(change, rank), reduced_dense(change.dense(), rank)):
        scale = change.dense().abs().max()
        assert (found.factors.dense() - expected).abs().max() < 1e-10 * scale
        assert float(found.lost) == pytest.approx(float(lost), rel=1e-10, abs=1e-10)
        assert float(found.total) == pytest.approx(float(change.dense().square().sum()), rel=1e-12)
        assert found.factors.rank == rank
        rows = found.factors.a @ found.factors.a.mT
        assert torch.allclose(rows, torch.eye(rank).double().expand_as(rows), atol=1e-10)


@pytest.mark.parametrize("wide", [False, True])
def test_a_dense_change_of_lower_rank_than_asked_for(wide: bool) -> None:
    change = random_factors(1, 12, 20, 2) if wide else random_factors(1, 20, 12, 2)
    found = reduced_dense(change.dense(), 6)
    assert torch.allclose(found.factors.dense(), change.dense(), atol=1e-10) and float(found.lost) < 1e-10
    nothing = reduced_dense(torch.zeros(1, 6, 5), 3)
    assert not nothing.factors.dense().any() and float(nothing.total) == 0


def test_without_scipy_all_eigenvectors_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    change = torch.randn(2, 12, 9, dtype=torch.float64)
    one = reduced_dense(change, 3)
    monkeypatch.setattr(factors, "find_spec", lambda name: None)
    other = reduced_dense(change, 3)
    torch.testing.assert_close(other.factors.dense(), one.factors.dense())
    torch.testing.assert_close(other.lost, one.lost)


def test_inner_products_stacks_and_padding() -> None:
    one, other = random_factors(2, 9, 14, 5), random_factors(2, 9, 14, 3, -1.5)
    assert float(inner(one, other)) == pytest.approx(float((one.dense() * other.dense()).sum()), rel=1e-12)
    assert torch.allclose(stacked([one, other], [2.0, -0.3]).dense(), 2 * one.dense() - 0.3 * other.dense())
    wider = padded(one, 8)
    assert wider.rank == 8 and torch.equal(wider.dense(), one.dense())


@pytest.mark.parametrize("recipe", [Recipe.linear(), Recipe.slerp(), Recipe.model_stock(), Recipe.task_arithmetic()])
def test_recipes_of_one_number_a_layer_never_form_the_change(
    recipe: Recipe, linears: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = linears(a={}, b={"r": 2})

    def refuse(*_arguments: Any) -> Tensor:
        raise AssertionError("ΔW was formed")

    monkeypatch.setattr(Factors, "dense", refuse)
    monkeypatch.setattr("peftcore.methods.lora.adapter.Lora.delta_weight", refuse)
    monkeypatch.setattr("peftcore.methods.lora.adapter.Lora.merged_weight", refuse)
    monkeypatch.setattr("peftcore.merging.layer.reduced_dense", refuse)
    model.add_merged("whole", {"a": 1.0, "b": 1.0}, recipe)
    model.add_merged("cut", {"a": 1.0, "b": 1.0}, recipe, rank=3)
    for kind in ("svd", "cat"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], kind, kind)
    assert factors.inner is inner


def test_the_error_is_what_the_rank_cuts_off(linears: Any, changes: Any) -> None:
    model = linears(a={}, b={})
    exact = model.add_merged("whole", {"a": 1.0, "b": -0.4}, Recipe.task_arithmetic())
    assert exact.error == 0 and set(exact.errors.values()) == {0.0} and set(exact.ranks.values()) == {8}
    for recipe, name in ((Recipe.task_arithmetic(), "factored"), (Recipe.magnitude_prune(1.0), "dense")):
        report = model.add_merged(name, {"a": 1.0, "b": -0.4}, recipe, rank=3)
        squares = {}
        for path, whole in changes(model, "whole").items():
            squares[path] = ((whole - changes(model, name)[path]).square().sum(), whole.square().sum())
            assert report.errors[path] == pytest.approx(float((squares[path][0] / squares[path][1]).sqrt()), rel=1e-8)
        lost, total = (sum(float(pair[i]) for pair in squares.values()) for i in (0, 1))
        assert report.error == pytest.approx((lost / total) ** 0.5, rel=1e-8) and set(report.ranks.values()) == {3}
