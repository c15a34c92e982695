"""Plain layers in place of quantised ones, with the weights that the quantised layers compute with."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from peftcore.bases.base import BaseWeight


@torch.no_grad()
def replace_quantized(model: nn.Module, bases: Mapping[str, BaseWeight], dtype: torch.dtype | None) -> None:
    """Replace the quantised ones of some layers by plain ones; a layer with several paths stays one layer.

    Args:
        model: The model, in place.
        bases: {path of a layer in the model: its view}.
        dtype: Dtype of the new layers; None for the dtype in which each quantised layer multiplies.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    quantized = {path: base for path, base in bases.items() if base.quantized}
    plain = {id(base.layer): _plain(base, dtype) for base in {id(b.layer): b for b in quantized.values()}.values()}
    for path, base in quantized.items():
        owner, _, name = path.rpartition(".")
        modules[owner]._modules[name] = plain[id(base.layer)]
    if quantized:
        _forget_quantisation(model)


def unquantized_dtype(modules: Iterable[nn.Module]) -> torch.dtype | None:
    """Return the dtype of most weights outside of quantised layers, which is that of the model's activations.

    Args:
        modules: Modules of a model, without quantised layers and without adapters.

    Returns:
        The dtype; None if the modules have no floating-point parameters.
    """
    weights: Counter[torch.dtype] = Counter()
    for module in modules:
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_floating_point():
                weights[parameter.dtype] += parameter.numel()
    return max(weights, key=lambda dtype: weights[dtype], default=None)


def _plain(base: BaseWeight, dtype: torch.dtype | None) -> nn.Linear:
    """Return an `nn.Linear` with the current weight and bias of a quantised layer."""
    dtype = dtype or base.activation_dtype or base.dtype
    layer = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
    for name, value in (("weight", base.read()), ("bias", base.bias)):
        if value is not None:
            layer._parameters[name] = nn.Parameter(
                value.detach().to(dtype, copy=True).contiguous(), requires_grad=False
            )
    return layer.train(base.layer.training)


def _forget_quantisation(model: Any) -> None:
    """Remove what transformers notes about the storage of a model, so that the model is saved as a plain one."""
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)
    elif getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        del model.config.quantization_config
