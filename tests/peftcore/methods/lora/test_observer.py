"""An observer sees a layer's input and output, and may replace the output."""

import torch
from torch import Tensor, nn

from peftcore import LoraConfig
from peftcore.methods.lora.observer import Observer


def test_the_hook_passes_input_and_output_and_replaces_the_output() -> None:
    seen: list[tuple[str, Tensor]] = []

    class Doubling(Observer):
        def observe(self, path: str, x: Tensor, y: Tensor) -> Tensor:
            seen.append((path, x))
            return 2 * y

    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    expected = 2 * layer(x)
    handle = layer.register_forward_hook(Doubling(LoraConfig(), {}).hook("here"))
    assert torch.equal(layer(x), expected) and seen[0][0] == "here" and torch.equal(seen[0][1], x)
    handle.remove()
