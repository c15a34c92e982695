"""Arguments of the functions for quantised layers."""

from typing import Any

import torch
from argument_checks import checks
from quantised_layers import quantised
from torch import nn

from peftcore import dequantize_base, register_storage
from peftcore.bases.plain import LinearWeight
from peftcore.bases.storages import registered_classes


@checks("dequantize_base", "model dtype")
def test_the_layers_of_this_model_get_this_dtype() -> None:
    first, second = (nn.Sequential(quantised(kind)) for kind in ("nf4", "fp4"))
    plain: Any = dequantize_base(first)
    assert type(plain[0]) is nn.Linear and type(second[0]) is not nn.Linear
    half: Any = dequantize_base(second, dtype=torch.bfloat16)
    assert (plain[0].weight.dtype, half[0].weight.dtype) == (torch.float32, torch.bfloat16)


@checks("register_storage", "classes")
def test_each_class_gets_the_view() -> None:
    @register_storage("acme_storage.First", "acme_storage.Second")
    class _View(LinearWeight):
        pass

    assert {"acme_storage.First", "acme_storage.Second"} <= set(registered_classes())
