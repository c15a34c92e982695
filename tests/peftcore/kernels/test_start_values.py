"""Start values are those of PyTorch's modules, whatever the type of the parameter."""

from typing import Any

import pytest
import torch
from torch import nn

from peftcore.kernels.start_values import kaiming_uniform_, module_, normal_, without_values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_numbers_are_drawn_in_the_default_type(dtype: torch.dtype) -> None:
    for fill, make in ((normal_, lambda: nn.Embedding(5, 7)), (kaiming_uniform_, lambda: nn.Linear(7, 5, bias=False))):
        torch.manual_seed(0)
        expected, after = make().weight, torch.rand(1)
        torch.manual_seed(0)
        filled = fill(torch.empty(5, 7, dtype=dtype))
        assert torch.equal(filled, expected.to(dtype)) and torch.rand(1) == after


def test_the_meta_device_needs_no_numbers() -> None:
    torch.manual_seed(0)
    after = torch.rand(1)
    torch.manual_seed(0)
    normal_(torch.empty(5, device="meta"))
    assert torch.rand(1) == after


@pytest.mark.parametrize(
    "make",
    [
        lambda create: nn.Sequential(create(nn.Linear, 4, 6), nn.ReLU(), create(nn.Linear, 6, 3)),
        lambda create: create(nn.LSTM, 4, 3, 2, bidirectional=True),
    ],
    ids=["Linear", "LSTM"],
)
def test_a_module_without_values_gets_the_default_values(make: Any) -> None:
    torch.manual_seed(0)
    expected = make(lambda kind, *sizes, **options: kind(*sizes, **options))
    after = torch.rand(1)
    torch.manual_seed(0)
    module = make(without_values)
    module_(module)
    assert torch.rand(1) == after
    for key, tensor in expected.state_dict().items():
        assert torch.equal(module.state_dict()[key], tensor), key
