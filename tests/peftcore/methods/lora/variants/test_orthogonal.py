"""The orthogonal start: BA = 0 with neither factor zero."""

import pytest
import torch
from lora_nets import adapter, lora, net_and_input

pytestmark = pytest.mark.filterwarnings("ignore")  # the oracle warns about its own deprecated calls


def test_orthogonal_start_is_the_base_with_neither_factor_zero() -> None:
    net, x = net_and_input("linear")
    base = net(x)
    net = lora(net, init_lora_weights="orthogonal")
    torch.testing.assert_close(net(x), base, rtol=1e-6, atol=1e-6)
    assert min(adapter(net).lora_A_weight.abs().max(), adapter(net).lora_B_weight.abs().max()) > 0
