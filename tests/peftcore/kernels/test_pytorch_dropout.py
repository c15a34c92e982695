"""The dropout mask is PyTorch's, and comes back from its packed form."""

import pytest
import torch
from torch.nn import functional as F

from peftcore.kernels.pytorch_dropout import PytorchDropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.05, 0.5, 1.0])
def test_it_drops_the_elements_that_pytorch_drops(p: float, dtype: torch.dtype) -> None:
    x = torch.rand(3, 7, 11, dtype=dtype) + 1
    torch.manual_seed(0)
    expected, after = F.dropout(x, p), torch.rand(1)
    torch.manual_seed(0)
    dropout, flat = PytorchDropout(p), x.view(21, 11)
    mask, saved = dropout.draw(flat)
    assert torch.rand(1) == after, "the generator is elsewhere"
    torch.testing.assert_close((mask.apply(flat) * dropout.scale).view(x.shape), expected)
    assert torch.equal(dropout.again(flat, saved).keep, mask.keep) and len(saved) == 29  # 231 bits


def test_an_empty_input_draws_nothing() -> None:
    torch.manual_seed(0)
    after = torch.rand(1)
    torch.manual_seed(0)
    mask, saved = PytorchDropout(0.5).draw(torch.empty(0, 4))
    assert mask.keep.shape == (0, 4) and PytorchDropout(0.5).again(torch.empty(0, 4), saved).keep.shape == (0, 4)
    assert torch.rand(1) == after
