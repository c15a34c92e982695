"""Cases of the contract tests, and of others: each method that adapts single layers, on each layer that it takes."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from method_example import examples, randomise
from net import Net
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftcore import get_peft_model
from peftcore.injection.adapter_set import adapter_set
from peftcore.registry import methods

EXAMPLES = {method: example for method, example in examples().items() if not example.whole_model}


def cases_of(layers: Mapping[str, tuple[str, Any, Any]]) -> list[Any]:
    """Parameters (method, layer) of a test: each method on each layer of {name: (kind, ...)} that it takes."""
    return [
        pytest.param(method, layer, id=f"{method}-{layer}")
        for method in EXAMPLES
        for layer, (kind, _, _) in layers.items()
        if kind in methods()[method].adapter.layer_kinds
    ]


LAYERS: dict[str, tuple[str, Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "Linear": ("linear", lambda: nn.Linear(12, 8), lambda: torch.randn(3, 5, 12)),
    "Linear without bias": ("linear", lambda: nn.Linear(12, 8, bias=False), lambda: torch.randn(3, 12)),
    "Conv1D": ("linear", lambda: Conv1D(8, 12), lambda: torch.randn(3, 5, 12)),
    "Conv1d": ("conv", lambda: nn.Conv1d(12, 8, 3, padding=2, dilation=2), lambda: torch.randn(2, 12, 9)),
    "Conv2d": ("conv", lambda: nn.Conv2d(6, 8, 3, 2, 1, padding_mode="reflect"), lambda: torch.randn(2, 6, 9, 9)),
    "Conv2d 1x1": ("conv", lambda: nn.Conv2d(6, 8, 1), lambda: torch.randn(2, 6, 4, 4)),
    "Conv3d": ("conv", lambda: nn.Conv3d(4, 8, (1, 2, 3)), lambda: torch.randn(2, 4, 5, 5, 5)),
    "Embedding": ("embedding", lambda: nn.Embedding(20, 8, padding_idx=0), lambda: torch.randint(0, 20, (3, 5))),
    "LayerNorm": ("norm", lambda: nn.LayerNorm(12), lambda: torch.randn(3, 5, 12)),
}
CASES = cases_of(LAYERS)
MERGING = [case for case in CASES if EXAMPLES[case.values[0]].merges_on(case.values[1])]  # type: ignore[index]
UNMERGED = [case for case in CASES if case not in MERGING]
METHODS = list(EXAMPLES)
LINEAR = [method for method in EXAMPLES if "linear" in methods()[method].adapter.layer_kinds]


def adapt(net: nn.Module, method: str, layer: str = "", **options: Any) -> Any:
    """The net with an adapter whose parameters are away from their start."""
    net = get_peft_model(net, EXAMPLES[method].make(layer, **{"target_modules": ["target"], **options}))
    randomise(net, EXAMPLES[method].spread)
    for adapter in adapter_set(net).adapters("default").values():
        adapter.eval()  # Poly draws its mixture anew in each training forward
    return net


def build(layer: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    """(net, input, the base's output)."""
    torch.manual_seed(0)
    _, make_layer, inputs = LAYERS[layer]
    net, x = Net(make_layer()).to(dtype), inputs()
    if isinstance(norm := net.target, nn.LayerNorm):
        nn.init.normal_(norm.weight)
    x = x.to(dtype) if x.is_floating_point() else x
    return net, x, net(x).detach()


def make(method: str, layer: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Tensor, Tensor]:
    """(adapted net, input, the base's output)."""
    net, x, base = build(layer, dtype)
    return adapt(net, method, layer), x, base
