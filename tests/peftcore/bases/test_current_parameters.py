"""A module's output with other tensors in the place of its parameters, whether these stand as parameters or not."""

import itertools

import pytest
import torch
from torch import nn

from peftcore.bases.current_parameters import call_with_parameters
from peftcore.bases.plain import current_parameter


@pytest.mark.parametrize("aside", [(), ("weight",), ("bias",), ("weight", "bias")])
def test_every_tensor_is_replaced_and_put_back(aside: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 3), torch.randn(2, 4)
    for name in aside:  # as FSDP 1 has them while it computes
        tensor = getattr(layer, name).detach()
        del layer._parameters[name]
        layer.__dict__[name] = tensor
    own = {name: current_parameter(layer, name) for name in ("weight", "bias")}
    for names in itertools.chain(itertools.combinations(own, 1), [tuple(own)]):
        new = {name: torch.randn_like(getattr(layer, name)) for name in names}
        now = {**own, **new}
        torch.testing.assert_close(
            call_with_parameters(layer, new, (x,)), nn.functional.linear(x, now["weight"], now["bias"])
        )
        assert all(current_parameter(layer, name) is tensor for name, tensor in own.items())
