"""Second moments of inputs, and their root."""

import pytest
import torch

from peftcore import ConfigError
from peftcore.kernels.input_moments import InputMoments, cholesky_root


def test_the_moment_is_the_mean_over_tokens_that_are_no_padding() -> None:
    torch.manual_seed(0)
    moments = InputMoments("test")
    rows = []
    for _ in range(3):
        x, mask = torch.randn(2, 5, 4), torch.rand(2, 5) > 0.3
        moments.begin({"attention_mask": mask.long()})
        moments.add("a", x)
        moments.add("b", x)  # a sibling with the same input
        moments.add("c", 2 * x)
        rows.append(x[mask])
    seen = torch.cat(rows)
    expected = seen.T @ seen / len(seen)
    assert moments.tokens == {"a": len(seen), "b": len(seen), "c": len(seen)}
    for path, factor in (("a", 1), ("b", 1), ("c", 4)):
        torch.testing.assert_close(moments.pop(path), factor * expected)


def test_inputs_that_are_not_finite_are_refused_with_layer_and_batch() -> None:
    moments = InputMoments("test")
    moments.begin({})
    moments.add("0", torch.ones(3, 2))
    moments.begin({})
    for wrong in (float("nan"), float("inf"), 1e30):
        with pytest.raises(ConfigError, match=r"the input of 0 has values in batch 2 that are NaN"):
            moments.add("0", torch.tensor([[1.0, wrong]]))


def test_the_root_of_a_moment_also_of_a_singular_one() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 6, dtype=torch.float64)
    moment = x.T @ x / 50
    root = cholesky_root(moment, 1e-12)
    torch.testing.assert_close(root @ root.T, moment)
    torch.testing.assert_close(
        cholesky_root(moment, 0.5).square().sum(), 1.5 * moment.trace(), msg="the trace grows by the damping"
    )
    few = torch.randn(2, 6)
    singular = few.T @ few
    root = cholesky_root(singular, 1e-6)
    torch.testing.assert_close((root @ root.T).float(), singular, rtol=1e-3, atol=1e-3)
    assert cholesky_root(torch.zeros(3, 3), 1e-6).isfinite().all()
