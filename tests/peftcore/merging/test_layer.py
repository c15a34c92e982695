"""The merge of one layer equals the weighted sum of dense changes."""

import pytest
import torch

from peftcore.kernels.factors import Factors
from peftcore.merging.layer import merged_layer
from peftcore.merging.recipe import Recipe
from peftcore.merging.weight_changes import Change


@pytest.mark.parametrize("dense", [False, True])
def test_an_adapter_that_lacks_the_layer_counts_as_zero(dense: bool) -> None:
    torch.manual_seed(0)
    factors = Factors(torch.randn(1, 2, 7).double(), torch.randn(1, 5, 2).double(), 0.5)
    bias = torch.randn(5).double()
    change = Change(factors.dense() if dense else factors, bias)
    merged = merged_layer([change, None, change], [2.0, 3.0, -0.5], Recipe.task_arithmetic(), 2, None)
    torch.testing.assert_close(merged.factors.dense(), 1.5 * factors.dense())
    torch.testing.assert_close(merged.bias, 1.5 * bias)
    assert float(merged.total) == pytest.approx(float((1.5 * factors.dense()).square().sum()))
