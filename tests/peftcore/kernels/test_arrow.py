"""Arrow: prototypes and weights equal the definitions of its paper."""

import pytest
import torch

from peftcore.kernels.arrow import iterated_prototype, prototype, token_weights


def test_a_prototype_is_the_first_right_singular_vector() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(3, 12, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    expected = torch.linalg.svd(b @ a)[2][0]
    assert abs(float(prototype(a, b) @ expected)) == pytest.approx(1.0)


def test_the_iteration_ends_at_the_prototype_if_one_direction_dominates() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(3, 12), torch.randn(8, 3) * torch.tensor([5.0, 1.0, 1.0])
    for start in torch.randn(3, 12):
        found = iterated_prototype(a, b, start)
        assert abs(float(found @ prototype(a, b))) == pytest.approx(1.0, abs=1e-5)
    assert iterated_prototype(a.half(), b.half(), torch.randn(12)).dtype == torch.float16


def test_the_weights_are_a_softmax_over_the_best_adapters() -> None:
    x, prototypes = torch.tensor([[1.0, -3.0, 2.0]]), torch.eye(3)
    torch.testing.assert_close(token_weights(x, prototypes, 3, 1.0), torch.tensor([[1.0, 3.0, 2.0]]).softmax(-1))
    two = torch.tensor([1.5, 1.0]).softmax(-1)
    torch.testing.assert_close(token_weights(x, prototypes, 2, 2.0), torch.stack([torch.tensor(0.0), *two])[None])
    assert token_weights(x, prototypes, 1, 1.0).tolist() == [[0.0, 1.0, 0.0]]
    assert torch.equal(token_weights(x, prototypes, 9, 1.0), token_weights(x, prototypes, 3, 1.0))
