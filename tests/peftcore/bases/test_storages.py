"""Views register for the classes that they read."""

from typing import Any

import pytest
import torch
from torch import nn

from peftcore import ConfigError, LoraConfig, TargetError, get_peft_model, register_storage
from peftcore.bases import base_weight, is_adaptable
from peftcore.bases.plain import LinearWeight
from peftcore.bases.storages import registered_classes


def test_the_storages_of_this_package_are_registered() -> None:
    expected = {"bitsandbytes.Params4bit", "bitsandbytes.Int8Params", "torchao.TorchAOBaseTensor", "hqq.HQQLinear"}
    assert expected | {"gptqmodel.GPTQQuantLinear", "gptqmodel.AWQuantLinear"} <= set(registered_classes())


@pytest.mark.parametrize("name", ["HQQLinear", "hqq.core.HQQLinear", "hqq.", "hqq.HQQ Linear"])
def test_a_name_of_another_form_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"no top-level package and class; give a name such as 'hqq\.HQQLinear'"):
        register_storage(name)


def test_a_class_has_one_view() -> None:
    with pytest.raises(ConfigError, match=r"hqq\.HQQLinear has the view peftcore\.bases\.hqq\.HqqWeight already"):

        @register_storage("hqq.HQQLinear")
        class _Other(LinearWeight):
            pass


def test_a_layer_of_an_unknown_class_is_refused_with_the_classes_that_fit() -> None:
    with pytest.raises(TargetError, match=r"is a Bilinear, which cannot be adapted.*hqq\.HQQLinear"):
        base_weight(nn.Bilinear(2, 2, 2))


class TorchAOBaseTensor(torch.Tensor):
    """A weight of torchao that the library may add."""


def test_a_weight_of_another_kind_is_refused_with_those_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TorchAOBaseTensor, "__module__", "torchao.utils")
    layer = nn.Linear(4, 4)
    weight: Any = layer.weight.detach().as_subclass(TorchAOBaseTensor)
    layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    assert not is_adaptable(layer)
    with pytest.raises(TargetError, match=r"0 is a Linear.*TorchAOBaseTensor.*Int8Tensor and IntxUnpackedToInt8Tensor"):
        get_peft_model(nn.Sequential(layer), LoraConfig(r=2, target_modules=["0"]))
