"""A layer with its own selection: routes have precedence, and everything else is the model's."""

import torch
from torch import nn

from peftcore import LoraConfig, get_peft_model


def model_with_a_switched_layer() -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), config, "a").eval()
    model.add_adapter("b", config)
    model[0].set_adapter("b")
    return model


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


def test_a_route_has_precedence() -> None:
    model = model_with_a_switched_layer()
    mixed = model(X)
    with model.route("a"):  # type: ignore[operator]
        assert model[0].active_adapters == ["b"] and model[0].selection.in_effect == ("a",)
        routed = model(X)
    model.set_adapter("a")  # type: ignore[operator]
    torch.testing.assert_close(model(X), routed)
    assert not torch.allclose(mixed, routed)


def test_the_base_is_alone_inside_of_disable_adapter() -> None:
    model = model_with_a_switched_layer()
    with model.disable_adapter():  # type: ignore[operator]
        assert model[0].disable_adapters and model[1].disable_adapters
        base = model(X)
    assert not model[0].disable_adapters and model[0].active_adapters == ["b"]
    torch.testing.assert_close(base, model.unload()(X))  # type: ignore[operator]


def test_caches_are_the_models() -> None:
    model = model_with_a_switched_layer()
    own, shared = model[0].selection, model[1].selection
    assert own is not shared and own.stacks is shared.stacks and own.owner is shared.owner
