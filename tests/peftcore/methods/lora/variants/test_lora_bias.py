"""LoRA with a bias of its own: merging."""

import pytest
import torch
from lora_nets import adapter, lora, net_and_input
from method_example import randomise
from torch import nn

from peftcore import MergeError, PeftWarning

pytestmark = pytest.mark.filterwarnings("ignore")  # the oracle warns about its own deprecated calls


def test_lora_bias_merges_with_its_scale() -> None:
    net, x = net_and_input("linear")
    net = lora(net, lora_bias=True)
    randomise(net, 0.3)
    adapted = net(x)
    a, layer = adapter(net), net[0].base_layer
    expected = x @ (layer.weight + a.delta_weight()).T + layer.bias + 3 * a.lora_bias
    torch.testing.assert_close(adapted, expected, rtol=1e-10, atol=1e-10)
    net.merge_adapter()
    torch.testing.assert_close(net(x), adapted, rtol=1e-10, atol=1e-10)


def test_lora_bias_without_a_bias_to_merge_into_is_refused() -> None:
    with pytest.warns(PeftWarning, match=r"lora_bias: 0 has no bias \(1 layers in all\), so the adapter cannot be"):
        net = lora(nn.Sequential(nn.Linear(6, 5, bias=False)), lora_bias=True)
    with pytest.raises(MergeError, match="no bias"):
        net.merge_adapter()
