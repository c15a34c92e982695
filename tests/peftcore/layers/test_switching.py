"""One layer switches, merges and deletes adapters, by the methods of HF PEFT's layers."""

import copy

import peft
import pytest
import torch
from torch import nn

import peftcore
from peftcore import AdapterNameError, LoraConfig, MergeError, get_peft_model, inject_adapter_in_model
from peftcore.layers.adapter_layer import AdapterLayer
from peftcore.layers.saved_module import SavedModule
from peftcore.layers.switching import MergingMethods, SwitchingMethods


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))


def with_adapters() -> nn.Module:
    model = net()
    for name in ("a", "b"):
        config = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
        inject_adapter_in_model(config, model, name)
    return model


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


def layers(model: nn.Module) -> list[AdapterLayer]:
    return [module for module in model.modules() if isinstance(module, AdapterLayer)]


def trainable(layer: AdapterLayer) -> list[str]:
    return [n for n in layer.adapters if all(p.requires_grad for p in layer.adapters[n].parameters())]


def test_set_adapter_of_a_layer_acts_on_the_layer() -> None:
    model = with_adapters()
    first, second = layers(model)
    before = trainable(second)
    first.set_adapter("a")
    assert first.active_adapters == ["a"] and second.active_adapters == ["b"]
    assert trainable(first) == ["a"] and trainable(second) == before
    second.set_adapter(["a", "b"], inference_mode=True)
    assert second.active_adapter == ["a", "b"] and trainable(second) == []
    with pytest.raises(AdapterNameError, match="at most once"):
        first.set_adapter(["a", "a"])
    assert first.active_adapters == ["a"]


def test_adapters_of_another_model_have_no_effect_in_a_layer() -> None:
    model = with_adapters()
    for layer in layers(model):  # as diffusers does where a LoRA has no part for the text encoder
        layer.set_adapter("of the unet")
        layer.set_scale("of the unet", 2.0)
    assert torch.equal(model(X), net()(X))
    for layer in layers(model):
        layer.set_adapter(["a", "of the unet"])
    assert [layer.active_adapters for layer in layers(model)] == [["a"]] * 2 and not torch.equal(model(X), net()(X))


def test_scripts_also_assign_the_state_of_a_layer() -> None:
    results = []
    for library in (peftcore, peft):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        config = library.LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False)
        adapted = library.get_peft_model(base, config)
        adapted.add_adapter("other", config)
        layer, x = adapted.base_model.model[0], torch.ones(1, 4)
        layer._active_adapter = "other"
        assert layer.active_adapters == ["other"] and adapted.get_model_status().active_adapters == "irregular"
        frozen = [not layer.lora_A[name].weight.requires_grad for name in ("default", "other")]
        outputs = [layer(x)]
        layer._disable_adapters = True
        assert layer.disable_adapters and adapted.get_model_status().enabled == "irregular"
        outputs.append(layer(x))
        layer._disable_adapters = False
        results.append((frozen, *outputs, layer(x)))
    torch.testing.assert_close(results[0], results[1])


def test_the_model_has_the_state_on_which_all_layers_agree() -> None:
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["0", "2"]), "a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["2"]))
    first, second = layers(model)
    first.set_adapter("b")
    assert model.active_adapter == "a" and second.active_adapters == ["a"]
    second.set_adapter("b")
    assert model.active_adapter == "b"


def test_switching_the_model_switches_every_layer() -> None:
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["0", "2"]), "a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["0", "2"]))
    first, second = layers(model)
    first.set_adapter("b")
    first.enable_adapters(False)
    model.set_adapter("a")
    assert first.active_adapters == second.active_adapters == ["a"]
    assert first.disable_adapters and not second.disable_adapters
    model.enable_adapters()
    assert not first.disable_adapters


def test_a_deleted_adapter_is_active_in_no_layer() -> None:
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["0", "2"]), "a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["2"]))
    layers(model)[1].set_adapter(["a", "b"])
    model.delete_adapter("b")
    assert [layer.active_adapters for layer in layers(model)] == [["a"], ["a"]]


def test_what_a_layer_has_set_to_train_is_frozen_by_the_model() -> None:
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["0"]), "a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["0"], inference_mode=True))
    (layer,) = layers(model)
    layer.set_adapter("b")
    assert trainable(layer) == ["b"]
    model.set_adapter("a")
    assert trainable(layer) == ["a"]


@pytest.mark.parametrize("with_gradients", [True, False])
def test_a_disabled_layer_computes_its_base(with_gradients: bool) -> None:
    model = with_adapters()
    with torch.set_grad_enabled(with_gradients):
        y = model(X)
        first, second = layers(model)
        first.enable_adapters(enabled=False)
        assert first.disable_adapters and not second.disable_adapters
        expected = model[3](second(torch.relu(first.base_layer(X))))
        torch.testing.assert_close(model(X), expected)
        assert not torch.allclose(expected, y)
        second.enable_adapters(enabled=False)
        assert torch.equal(model(X), net()(X))
        for layer in (first, second):
            layer.enable_adapters(enabled=True)
        assert torch.equal(model(X), y)


def test_disabling_unmerges() -> None:
    """As in HF PEFT, where a merged layer computes its base after `enable_adapters(False)`."""
    model = with_adapters()
    for layer in layers(model):
        layer.merge()
    for layer in layers(model):
        layer.enable_adapters(enabled=False)
    assert torch.equal(model(X), net()(X))


def test_a_layer_merges_and_unmerges_alone() -> None:
    model = with_adapters()
    y = model(X)
    first, second = layers(model)
    weight = first.base_layer.weight.clone()
    first.merge(safe_merge=True, adapter_names=["b"])
    assert first.merged_adapters == ["b"] and not second.merged_adapters
    assert not torch.equal(first.base_layer.weight, weight)
    torch.testing.assert_close(model(X), y)
    second.merge()
    first.unmerge()
    assert torch.equal(first.base_layer.weight, weight) and second.merged_adapters == ["b"]
    with pytest.raises(MergeError, match="merged into 2"):
        second.delete_adapter("b")
    second.unmerge()
    assert torch.equal(model(X), y)


def test_a_merge_that_fails_changes_nothing() -> None:
    model = with_adapters()
    first = layers(model)[0]
    with torch.no_grad():
        first.lora_B["b"].weight.fill_(float("inf"))
    weight = first.base_layer.weight.clone()
    with pytest.raises(MergeError, match="NaN or Inf"):
        first.merge(safe_merge=True)
    assert torch.equal(first.base_layer.weight, weight) and not first.merged_adapters


def test_a_layer_loses_one_adapter() -> None:
    model = with_adapters()
    first, second = layers(model)
    first.delete_adapter("b")
    first.delete_adapter("b")  # a layer without the adapter stays as it is
    assert list(first.adapters) == ["a"] and list(second.adapters) == ["a", "b"]
    with pytest.warns(UserWarning, match="'a' is the active one now"):
        del model.peft_config["b"]
    assert list(second.adapters) == ["a"] and list(model.peft_config) == ["a"]


def test_copies_of_modules_are_switched_too() -> None:
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["0"], modules_to_save=["3"]), "a")
    wrapper = model[3]
    assert isinstance(wrapper, SavedModule) and isinstance(wrapper, SwitchingMethods)
    assert not isinstance(wrapper, MergingMethods)
    wrapper.set_adapter("a", inference_mode=True)
    assert not any(p.requires_grad for p in wrapper.copies["a"].parameters())
    wrapper.set_adapter("a")
    assert all(p.requires_grad for p in wrapper.copies["a"].parameters())
    wrapper.enable_adapters(enabled=False)
    assert wrapper.disable_adapters and not model[0].disable_adapters
    assert torch.equal(wrapper(X), wrapper.original_module(X))


def test_a_copied_model_switches_itself() -> None:
    model = with_adapters()
    copied = copy.deepcopy(model)
    for layer in layers(copied):
        layer.set_adapter("a")
    assert layers(model)[0].active_adapters == ["b"] and layers(copied)[1].active_adapters == ["a"]
    layers(model)[0].set_adapter("a")
    again = copy.deepcopy(model)
    assert [layer.active_adapters for layer in layers(again)] == [["a"], ["b"]]
    layers(again)[1].set_adapter("a")
    assert layers(model)[1].active_adapters == ["b"]
