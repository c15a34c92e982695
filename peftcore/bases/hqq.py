"""Linear layers of HQQ, half-quadratic quantisation (https://mobiusml.github.io/hqq_blog), in 1 to 8 bits."""

import copy
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.bases.quantized_linear import QuantizedLinear
from peftcore.bases.storages import register_storage


@register_storage("hqq.HQQLinear")
class HqqWeight(QuantizedLinear):
    """`hqq.core.quantize.HQQLinear`: packed codes `W_q`, and scales and zero points in the dictionary `meta`."""

    backend = "hqq"

    def __init__(self, layer: nn.Module):
        super().__init__(layer)
        bias = self.layer.bias
        if isinstance(bias, Tensor) and not isinstance(bias, nn.Parameter):
            self.layer.bias = bias.detach()  # HQQ casts the parameter, so its copy still has the parameter's graph

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.compute_dtype

    def codes(self, state: Mapping[str, Any]) -> Tensor:
        return state["weight"]

    def read_from(self, state: Mapping[str, Any]) -> Tensor:
        layer = copy.copy(self.layer)  # shares all tensors; the attributes of the copy are those of the state
        layer._parameters = {**layer._parameters, "W_q": state["weight"]}
        layer.meta = dict(state["meta"])
        return layer.dequantize().detach()

    def write(self, weight: Tensor) -> None:
        make: Any = import_module("hqq.core.quantize").HQQLinear
        layer = self.layer
        config = {**copy.deepcopy(layer.quant_config), "offload_meta": layer.offload_meta}
        new = make(None, config, compute_dtype=layer.compute_dtype, device=layer.device)
        with torch.no_grad():
            new.quantize(weight.to(layer.compute_dtype), **new.quant_config)
        self.restore({"weight": new.W_q, "meta": new.meta})

    def write_bias(self, bias: Tensor) -> None:
        old = self.layer.bias
        new = bias.detach().to(old)
        self.layer.bias = nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new

    def state(self) -> dict[str, Any]:
        layer = self.layer
        return {"weight": layer.W_q, "meta": layer.meta, "bias": layer.bias}

    def move_state(self, state: dict[str, Any]) -> None:
        state["meta"] = _moved(state["meta"], state["weight"].device)

    def restore(self, state: dict[str, Any]) -> None:
        for name, attribute in (("weight", "W_q"), ("meta", "meta"), ("bias", "bias")):
            if name in state:
                setattr(self.layer, attribute, state[name])


def _moved(meta: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return HQQ's `meta` with its tensors, nested ones too, on a device."""
    return {
        key: value.to(device)
        if isinstance(value, Tensor)
        else _moved(value, device)
        if isinstance(value, Mapping)
        else value
        for key, value in meta.items()
    }
