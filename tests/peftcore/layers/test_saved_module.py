"""`modules_to_save`: one trainable copy of a module per adapter."""

from collections import OrderedDict
from typing import Any

import peft
import pytest
import torch
from net import Net
from routed_models import TOKENS, adapted, assert_rows_as_alone, llama, lora
from torch import Tensor, nn

import peftcore
from peftcore import AdapterNameError, LoraConfig, RoutingError, get_peft_model
from peftcore.composition import Stack
from peftcore.layers.saved_module import SavedModule

X = torch.randn(4, 6)


class Headed(nn.Module):
    def __init__(self, head: nn.Module):
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), head

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x))


def model_of(head: nn.Module) -> Any:
    """With adapters a and c, which train the head whole, and b, which does not; the body's adapters do nothing yet."""
    torch.manual_seed(0)
    model: Any = get_peft_model(Headed(head), LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"]), "a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["body"]))
    model.add_adapter("c", LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"]))
    return model


def scaled(model: Any) -> None:
    """Make the copies different: a's output is twice the original's, c's three times."""
    with torch.no_grad():
        for name, factor in (("a", 2), ("c", 3)):
            for parameter in model.head.copies[name].parameters():
                parameter.mul_(factor)


def test_the_active_adapters_copy_is_used_and_else_the_original() -> None:
    model = model_of(nn.Linear(6, 3))
    scaled(model)
    assert isinstance(model.head, SavedModule)
    with model.disable_adapter():
        base = model(X)
    for active, factor in ((["a"], 2), (["b"], 1), (["b", "c"], 3), (["c"], 3), ([], 1)):
        model.set_adapter(active)
        torch.testing.assert_close(model(X), factor * base)
    with pytest.raises(AdapterNameError, match=r"\['c', 'a'\] each train head in full"):
        model.set_adapter(["c", "a"])
    assert model.active_adapters == []


def test_each_row_of_a_mixed_batch_uses_its_own_copy() -> None:
    model = model_of(nn.Linear(6, 3))
    scaled(model)
    base = model(X, adapter_names="__base__")
    mixed = model(X, adapter_names=["c", "a", None, Stack("b", "c")])
    torch.testing.assert_close(mixed, base * torch.tensor([3.0, 2.0, 1.0, 3.0])[:, None])


def test_copies_cannot_be_mixed_and_outputs_of_several_tensors_have_no_rows() -> None:
    model = model_of(nn.Linear(6, 3))
    with pytest.raises(RoutingError, match=r"trained in full by \['a', 'c'\]"):
        model(X, adapter_names={"a": 0.5, "c": 0.5})

    class Two(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x

    model = model_of(Two(6, 3))
    with pytest.raises(RoutingError, match="returns more than a tensor"):
        model(X, adapter_names=["a", "c", None, "b"])


def test_only_the_copy_trains() -> None:
    model = get_peft_model(Net(nn.Linear(6, 6)), LoraConfig(r=2, target_modules=["target"]), "a")
    model.delete_adapter("a")
    assert isinstance(model.target, nn.Linear)
    model = model_of(nn.Linear(6, 3))
    model.set_adapter(["a"])
    model(X).sum().backward()
    assert model.head.base_layer.weight.grad is None and model.head.copies["c"].weight.grad is None
    assert model.head.copies["a"].weight.grad is not None


@pytest.mark.parametrize("library", [peft, peftcore], ids=["HF PEFT", "peftcore"])
def test_merging_an_inactive_adapter_leaves_the_copy_of_the_active_one(library: Any) -> None:
    """Copies are not weights that add up: the active adapter's copy acts, whatever is merged."""
    torch.manual_seed(0)
    base = nn.Sequential(OrderedDict(layer=nn.Linear(4, 4), head=nn.Linear(4, 3))).double()

    def config() -> Any:
        return library.LoraConfig(r=2, target_modules=["layer"], modules_to_save=["head"], init_lora_weights=False)

    model = library.get_peft_model(base, config())
    model.add_adapter("other", config())
    inner = model.base_model.model if library is peft else model
    head = inner.head
    copies = head.modules_to_save if library is peft else head.copies
    with torch.no_grad():
        for name in ("default", "other"):
            copies[name].weight.normal_()
    model.eval().merge_adapter(["other"])
    x = torch.randn(2, 4, dtype=torch.float64)
    torch.testing.assert_close(inner(x), copies["default"](inner.layer(x)), rtol=1e-12, atol=0)


def test_each_row_uses_its_own_adapters_copy_of_a_module() -> None:
    model = adapted(
        llama(),
        a=lora(modules_to_save=["lm_head"]),
        b=lora(),
        c=lora(target_modules=["q_proj"], modules_to_save=["lm_head", "model.norm"]),
    )
    assert_rows_as_alone(model, ["a", "b", "c", None, Stack("b", "c"), {"a": 0.5, "b": 0.5}])
    with pytest.raises(RoutingError, match=r"trained in full by \['a', 'c'\], and whole modules cannot be mixed"):
        model(TOKENS, adapter_names={"a": 0.5, "c": 0.5})


def test_a_copy_and_the_original_are_where_peft_has_them() -> None:
    wrappers = []
    for library in (peftcore, peft):
        config = library.LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"])
        torch.manual_seed(0)
        model = library.get_peft_model(Headed(nn.Linear(6, 3)), config)
        model.add_adapter("other", library.LoraConfig(r=2, target_modules=["body"]))
        wrappers.append((model, model.base_model.model.head))
    (ours, our_head), (theirs, their_head) = wrappers
    assert set(our_head.modules_to_save.keys()) == set(their_head.modules_to_save.keys()) == {"default"}
    torch.testing.assert_close(our_head.modules_to_save.default.weight, their_head.modules_to_save.default.weight)
    assert our_head.original_module.weight.requires_grad is their_head.original_module.weight.requires_grad is False
    for active in ("default", "other"):
        ours.set_adapter(active)
        theirs.set_adapter(active)
        assert our_head.active_adapters == their_head.active_adapters
