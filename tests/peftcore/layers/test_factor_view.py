"""The modules inside of a layer that scripts for HF PEFT read and write."""

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn

import peftcore
from peftcore import ConfigError, PeftError
from peftcore.layers.factor_view import FactorView


@pytest.fixture(params=[False, True], ids=["plain", "bias"])
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """The same layer in both libraries."""
    layers = []
    for library in (peftcore, peft):
        torch.manual_seed(0)
        config = library.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, lora_bias=request.param)
        layers.append(library.get_peft_model(nn.Sequential(nn.Linear(6, 5)), config).base_model.model[0])
    return layers[0], layers[1]


def test_a_factor_is_a_linear_layer(pair: tuple[Any, Any]) -> None:
    x = torch.randn(3, 2)
    ours, theirs = (layer.lora_B["default"] for layer in pair)
    assert isinstance(ours, nn.Linear) and isinstance(theirs, nn.Linear)
    torch.testing.assert_close(ours(x), theirs(x))
    assert repr(ours).removeprefix("LinearView") == repr(theirs).removeprefix("Linear")
    assert (ours.in_features, ours.out_features, ours.training) == (2, 5, theirs.training)
    for name in ("state_dict", "named_parameters"):
        mine, other = (dict(getattr(module, name)()) for module in (ours, theirs))
        assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)


def test_a_change_of_a_factor_is_a_change_of_the_adapter(pair: tuple[Any, Any]) -> None:
    x = torch.randn(3, 6)
    for change in (
        lambda factor: nn.init.ones_(factor.weight),
        lambda factor: setattr(factor, "weight", nn.Parameter(torch.full_like(factor.weight, 0.5))),
        lambda factor: factor.load_state_dict({name: 2 * value for name, value in factor.state_dict().items()}),
        lambda factor: factor.requires_grad_(False),
    ):
        for layer in pair:
            change(layer.lora_B["default"])
        torch.testing.assert_close(pair[0](x), pair[1](x))
    assert not pair[0].lora_B["default"].weight.requires_grad
    assert pair[0].lora_B["default"].half().weight.dtype == pair[0].lora_B["default"].weight.dtype == torch.float16
    parameters = [layer.lora_B["default"].to("meta").weight for layer in pair]
    assert pair[0].lora_B["default"].weight is parameters[0] and parameters[0].is_meta


def test_a_copy_of_a_factor_is_a_layer_of_its_own(pair: tuple[Any, Any]) -> None:
    factor = pair[0].lora_A["default"]
    copied = copy.deepcopy(factor)
    assert type(copied) is nn.Linear and torch.equal(copied.weight, factor.weight)
    assert copied.weight is not factor.weight and copied.training == factor.training


def test_what_would_have_no_effect_is_refused(pair: tuple[Any, Any]) -> None:
    factor = pair[0].lora_A["default"]
    for kind in ("forward", "forward_pre", "full_backward", "full_backward_pre"):
        with pytest.warns(UserWarning, match="register it on the layer"):
            getattr(factor, f"register_{kind}_hook")(print).remove()
    weight = factor.weight
    with pytest.raises(PeftError, match="cannot be parametrised"):
        nn.utils.parametrizations.weight_norm(factor)
    assert factor.weight is weight
    with pytest.raises(AttributeError, match="not 'extra'"):
        factor.extra = nn.Parameter(torch.ones(1))
    with pytest.raises(ConfigError, match=r"an nn\.Parameter of shape \(2, 6\)"):
        factor.weight = nn.Parameter(torch.ones(6, 2))


def test_the_factor_of_a_convolution_is_no_linear_layer() -> None:
    config = peftcore.LoraConfig(r=2, target_modules=["0"])
    model = peftcore.get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 2)), config)
    factor = model[0].lora_A["default"]
    assert isinstance(factor, FactorView) and not isinstance(factor, nn.Linear)
    assert factor.weight.shape == (2, 3, 2, 2) and factor.bias is None
    with pytest.raises(PeftError, match="only be called for a matrix"):
        factor(torch.ones(1, 3, 4, 4))
    assert torch.equal(copy.deepcopy(factor).weight, factor.weight)


def test_the_factors_of_a_tied_head_are_computed_and_not_assigned() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight  # type: ignore[assignment]
    config = peftcore.LoraConfig(r=2, target_modules=["0"], ensure_weight_tying=True)
    head = peftcore.get_peft_model(model, config)[1]
    factor = head.lora_A["default"]
    assert factor.weight.shape == (2, 3) and not list(factor.parameters())
    with pytest.raises(PeftError, match="tied embedding's adapter"):
        factor.weight = nn.Parameter(torch.ones(2, 3))


def test_a_list_of_parameters_is_a_list_of_the_adapters_own() -> None:
    config = peftcore.AdamssConfig(target_modules=["0"], r=4, num_subspaces=2, subspace_rank=1)
    layer: Any = peftcore.get_peft_model(nn.Sequential(nn.Linear(6, 5)), config)[0]
    factors = layer.adamss_A["default"]
    own = layer.adapters["default"].adamss_A
    assert len(factors) == len(own) == 2
    assert all(one is other for one, other in zip(factors, own, strict=True))
    with pytest.raises(IndexError, match="has 2 elements; got 2"):
        factors[2]
