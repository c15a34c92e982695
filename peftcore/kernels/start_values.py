"""Random start values, drawn as HF PEFT draws them: one seed gives the same adapter in both libraries.

PEFT creates parameters on the CPU in PyTorch's default type, and moves them to the base's device and type afterwards.
So the numbers are drawn on the CPU in that type, whatever the parameter's device and type are. PEFT also draws numbers
that it overwrites, such as the default values of `nn.Linear`. A method repeats these draws, because they advance the
generator.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def normal_(tensor: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Fill a tensor with normal numbers, as `torch.randn` and `nn.Embedding` do by default; return the tensor."""
    return _fill(tensor, lambda drawn: nn.init.normal_(drawn, mean, std))


def uniform_(tensor: Tensor, bound: float) -> Tensor:
    """Fill a tensor with uniform numbers in [−bound, bound]; return the tensor."""
    return _fill(tensor, lambda drawn: nn.init.uniform_(drawn, -bound, bound))


def kaiming_uniform_(tensor: Tensor) -> Tensor:
    """Fill a weight (o, i, *kernel) with the default values of `nn.Linear` and convolutions; return the weight."""
    return _fill(tensor, lambda drawn: nn.init.kaiming_uniform_(drawn, a=math.sqrt(5)))


def bias_(bias: Tensor, weight: Tensor) -> Tensor:
    """Fill a bias (o,) with its default values beside a weight (o, i, *kernel); return the bias."""
    return uniform_(bias, 1 / math.sqrt(math.prod(weight.shape[1:])))


def module_(module: nn.Module) -> None:
    """Fill an encoder of linear layers, or an LSTM, with PyTorch's default values."""
    for layer in module.modules():
        if isinstance(layer, nn.LSTM):
            for parameter in layer.parameters():
                uniform_(parameter, 1 / math.sqrt(layer.hidden_size))
        elif isinstance(layer, nn.Linear):
            kaiming_uniform_(layer.weight)
            bias_(layer.bias, layer.weight)


def without_values(kind: type[nn.Module], *sizes: int, **options: Any) -> Any:
    """Return a module of PyTorch without drawing its default values, on the default device."""
    device = torch.get_default_device()
    with torch.device("meta"):
        module = kind(*sizes, **options)
    return module.to_empty(device=device)


@torch.no_grad()
def _fill(tensor: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
    """Draw on the CPU in the default type, in place if the tensor is there; do nothing on the meta device."""
    if tensor.is_meta:
        return tensor
    dtype = torch.get_default_dtype()
    if tensor.device.type == "cpu" and tensor.dtype == dtype:
        return draw(tensor)
    return tensor.copy_(draw(torch.empty(tensor.shape, dtype=dtype, device="cpu")))
