"""LoftQ: nearer to the weight than quantising alone, and undone on deletion."""

import pytest
import torch
from lora_nets import adapter, lora, net_and_input
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore")  # the oracle warns about its own deprecated calls


@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_is_nearer_to_the_weight_than_quantising_alone(bits: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64))
    weight, x = net[0].weight.detach().clone(), torch.randn(3, 64)
    base = net(x)
    net = lora(net, r=8, lora_alpha=8, init_lora_weights="loftq", loftq_config={"loftq_bits": bits, "loftq_iter": 3})
    quantised = net[0].base_layer.weight.detach()
    assert not torch.equal(quantised, weight)
    error = (quantised + adapter(net).delta_weight() - weight).norm()
    assert error < 0.9 * (quantised - weight).norm()
    assert torch.equal(net.unload()(x), base)


def test_loftq_of_a_deleted_adapter_gives_the_weight_back() -> None:
    net, x = net_and_input("linear")
    base = net(x)
    net = lora(net, init_lora_weights="loftq")
    net.delete_adapter("default")
    assert torch.equal(net(x), base)
