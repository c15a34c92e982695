"""PiSSA: the start is the principal part of the weight."""

import pytest
import torch
from lora_nets import adapter, lora, net_and_input

pytestmark = pytest.mark.filterwarnings("ignore")  # the oracle warns about its own deprecated calls


def test_pissa_holds_the_principal_part() -> None:
    net, _ = net_and_input("linear")
    weight = net[0].weight.detach()  # type: ignore[index]
    net = lora(net, init_lora_weights="pissa")
    u, s, vh = torch.linalg.svd(weight)
    a = adapter(net)
    torch.testing.assert_close(
        a.scaling * a.lora_B_weight @ a.lora_A_weight, u[:, :2] * s[:2] @ vh[:2], rtol=1e-5, atol=1e-6
    )
