"""OLoRA: B starts with orthonormal columns."""

import pytest
import torch
from lora_nets import adapter, lora, net_and_input

pytestmark = pytest.mark.filterwarnings("ignore")  # the oracle warns about its own deprecated calls


def test_olora_has_orthonormal_columns() -> None:
    net, _ = net_and_input("linear")
    net = lora(net, init_lora_weights="olora")
    b = adapter(net).lora_B_weight
    torch.testing.assert_close(b.T @ b, torch.eye(2, dtype=b.dtype), rtol=1e-5, atol=1e-6)
