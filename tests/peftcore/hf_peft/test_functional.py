"""Functions on models whose class stays as it is."""

import warnings

import peft
import pytest
import torch
from peft import functional as peft_functional
from peftcore.functional import (
    cast_adapter_dtype,
    delete_adapter,
    inject_adapter_in_model,
    set_adapter,
    set_requires_grad,
)
from torch import nn

import peftcore
from peftcore import ConfigError, LoraConfig
from peftcore import functional as peftcore_functional


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    for name in ("a", "b"):
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), plain, name)
    return plain


def trained(model: nn.Module) -> set[str]:
    return {name.split(".")[2] for name, p in model.named_parameters() if "lora_" in name and p.requires_grad}


def test_switching(model: nn.Module) -> None:
    x = torch.randn(2, 4)
    y = model(x)
    set_adapter(model, "a")
    assert trained(model) == {"a"}
    assert not torch.equal(model(x), y)
    set_adapter(model, "b", inference_mode=True)
    assert trained(model) == set()
    assert torch.equal(model(x), y)
    set_requires_grad(model, ["a", "b"])
    assert trained(model) == {"a", "b"}


def test_deleting(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match="none with prefix 'ia3_'"):
        delete_adapter(model, "a", "ia3_")
    assert delete_adapter(model, "a", "lora_") == ["b"]
    with pytest.warns(UserWarning, match="'a' is not loaded, so nothing is deleted"):  # transformers takes a name twice
        assert delete_adapter(model, "a", "lora_") == ["b"]
    assert delete_adapter(model, "b", "lora_") == []
    assert type(model[0]) is nn.Linear


def test_deleting_returns_what_peft_returns() -> None:
    returned = []
    for library, functions in ((peftcore, peftcore_functional), (peft, peft_functional)):
        plain = nn.Sequential(nn.Linear(4, 5))
        with warnings.catch_warnings(action="ignore"):
            for name in "abc":
                library.inject_adapter_in_model(library.LoraConfig(r=2, target_modules=["0"]), plain, name)
            returned.append([functions.delete_adapter(plain, name, "lora_") for name in "acb"])
    assert returned == [[["c"], ["b"], []]] * 2


def test_casting(model: nn.Module) -> None:
    model.to(torch.bfloat16)
    cast_adapter_dtype(model, "a", autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    cast_adapter_dtype(model, "a")
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if ".a." in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if ".a." not in name} == {torch.bfloat16}


def test_a_class_of_some_layers_only_is_refused(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match="layer_cls must be BaseTunerLayer"):
        set_adapter(model, "a", layer_cls=nn.Linear)
