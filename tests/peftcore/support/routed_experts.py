"""Two layers with three LoRAs, between which gates choose for each token."""

from typing import Any

import torch
from torch import nn

from peftcore import LoraConfig, get_peft_model

NAMES = ["a", "b", "c"]
X = torch.linspace(-2, 2, 6 * 5 * 12, dtype=torch.float64).view(6, 5, 12).sin()


def adapted(bias: bool = True, **options: Any) -> Any:
    """The layers with all adapters; "c" is at the second layer only."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(12, 10, bias), nn.Tanh(), nn.Linear(10, 8, bias=False)).double()
    for number, name in enumerate(NAMES):
        layers = ["2"] if name == "c" else ["0", "2"]
        config = LoraConfig(
            r=2 + number, target_modules=layers, init_lora_weights=False, inference_mode=True, **options
        )
        if number:
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, name)
    return model.eval()
