"""`add_merged`: what it computes, and its report."""

from typing import Any

import pytest
import torch
from torch import Tensor

from peftcore import AdapterNameError, ConfigError, merging
from peftcore.kernels.factors import Factors, LowRankReport
from peftcore.merging import Recipe

SUM = Recipe.task_arithmetic()


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
    monkeypatch.setattr("peftcore.merging.layer.svd_of_dense", refuse)
    model.add_merged("whole", {"a": 1.0, "b": 1.0}, recipe)
    model.add_merged("cut", {"a": 1.0, "b": 1.0}, recipe, rank=3)
    for kind in ("svd", "cat"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], kind, kind)


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


def test_the_old_name_of_the_report_warns() -> None:
    with pytest.warns(DeprecationWarning, match="now called LowRankReport"):
        assert merging.MergeReport is LowRankReport


def test_a_name_that_is_taken_keeps_its_adapter(linears: Any, changes: Any) -> None:
    """PEFT returns without a word, and what one goes on with is the old adapter."""
    model = linears(a={}, b={})
    before = changes(model, "b")
    for call in (
        lambda: model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "b", "cat"),
        lambda: model.add_merged("b", {"a": 1.0, "b": 1.0}, SUM),
    ):
        with pytest.raises(AdapterNameError, match="delete it or take another name"):
            call()
    assert all(torch.equal(before[path], change) for path, change in changes(model, "b").items())


@pytest.mark.parametrize(
    ("weights", "recipe", "message"),
    [
        ({}, SUM, "no adapters to merge"),
        ({"a": float("inf")}, SUM, "finite numbers; got inf"),
        ({"a": 1.0, "b": -1.0}, Recipe.linear(), "average needs weights of at least 0.*task_arithmetic"),
        ({"a": 0.0, "b": 0.0}, Recipe.linear(), "average needs weights"),
        ({"a": 1.0}, Recipe.slerp(), "two weights of at least 0"),
        ({"a": 1.0, "b": -0.5}, Recipe.slerp(), "two weights of at least 0"),
        ({"a": 1.0}, Recipe.model_stock(), "two or more adapters"),
        ({"a": 1.0, "b": 2.0}, Recipe.model_stock(), "give each the same weight"),
        ({"a": 1.0, "b": 2.0}, "ties", "such as Recipe.ties.* got 'ties'"),
    ],
    ids=str,
)
def test_of_weights(weights: dict[str, float], recipe: Any, message: str, linears: Any, refused: Any) -> None:
    model = linears(a={}, b={})
    refused(model, ConfigError, message, lambda: model.add_merged("m", weights, recipe))
