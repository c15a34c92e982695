"""Small nets with adapters, and what the tests of arguments ask of them."""

from typing import Any

import torch
from torch import Tensor, nn

import peftcore
from peftcore import (
    LoraConfig,
    get_peft_model,
)

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


def lora(*targets: str, **options: Any) -> LoraConfig:
    fixed = {"r": 2, "target_modules": list(targets or ("0",)), "init_lora_weights": False}
    return LoraConfig(**{**fixed, **options})


class Plain(nn.Sequential):
    """Two layers, which take a further argument."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(6, 6), nn.Linear(6, 6))
        self.to(dtype)

    def forward(self, x: Tensor, times: float = 1.0) -> Tensor:
        return super().forward(x) * times


def net(*names: str, **options: Any) -> Any:
    """A net with LoRAs; those after the first are not active."""
    model = get_peft_model(Plain(), lora(**options), *names[:1])
    for name in names[1:]:
        model.add_adapter(name, lora(**options))
    return model


def tensors_of(model: Any, name: str = "default") -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.get_adapter_state_dict(name).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def adalora() -> Any:
    options = {"init_r": 4, "target_r": 1, "tinit": 1, "tfinal": 1, "deltaT": 1, "total_step": 4}
    return get_peft_model(Plain(), peftcore.AdaLoraConfig(target_modules=["0", "1"], **options))
