"""Adapters are merged into the base weights, and into a new adapter."""

from typing import Any

import pytest
import torch
from torch import Tensor
from two_adapters import logits

from peftcore.composition import Only
from peftcore.merging import Recipe


def test_one_name_is_merged_by_its_name(model: Any) -> None:
    adapted = logits(model)
    plain = model.merge_and_unload(adapter_names="a")
    torch.testing.assert_close(logits(plain), adapted, atol=1e-5, rtol=0)


def test_merging_for_a_block_gives_the_weights_back_bit_for_bit(model: Any) -> None:
    layer = model.model.layers[0].self_attn.q_proj.base_layer
    before, adapted = layer.weight.clone(), logits(model)
    with model.merged():
        assert not torch.equal(layer.weight, before)
        torch.testing.assert_close(logits(model), adapted, atol=1e-5, rtol=0)
    assert torch.equal(layer.weight, before)
    model.merge_adapter()
    assert not torch.equal(layer.weight, before)
    model.unmerge_adapter()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("new", ["algebra", "mapping", "weighted"])
def test_a_merged_adapter_is_the_weighted_sum_of_the_changes(new: str, model: Any) -> None:
    def change(adapters: dict[str, float], layer: str) -> Tensor:
        module = model.get_submodule(f"model.layers.0.{layer}")
        x = torch.eye(module.in_features)
        with torch.no_grad(), model.route(adapters):
            return module(x) - module.base_layer(x)

    if new == "algebra":
        model.add_merged("m", 0.7 * Only("a") + 0.3 * Only("b"), Recipe.linear())
    elif new == "mapping":
        model.add_merged("m", {"a": 0.7, "b": 0.3}, Recipe.linear())
    else:
        model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "m", combination_type="cat")
    for layer in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"):
        expected = change({"a": 0.7, "b": 0.3}, layer)
        torch.testing.assert_close(change({"m": 1.0}, layer), expected, atol=1e-5, rtol=0)
