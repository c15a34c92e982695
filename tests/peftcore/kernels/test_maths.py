"""Matrix functions equal their definitions."""

import pytest
import torch
from torch import nn

from peftcore.bases import base_weight
from peftcore.kernels.maths import (
    cayley,
    drop_blocks,
    keep_rows,
    random_places,
    rotate_blocks,
    scaled,
    weight_shape,
    widened,
)


def blocks_of(count: int, size: int) -> torch.Tensor:
    skew = torch.randn(count, size, size).double()
    return cayley(skew - skew.mT)


def test_the_cayley_transform_is_orthogonal_without_eigenvalue_minus_one() -> None:
    torch.manual_seed(0)
    q = blocks_of(3, 4)
    torch.testing.assert_close(q @ q.mT, torch.eye(4).double().expand(3, 4, 4))
    assert (torch.linalg.eigvals(q) + 1).abs().min() > 1e-3


@pytest.mark.parametrize("shared", [False, True])
def test_rotated_blocks_equal_the_block_diagonal_matrix(shared: bool) -> None:
    torch.manual_seed(0)
    blocks, x = blocks_of(1 if shared else 3, 4), torch.randn(5, 12).double()
    dense = torch.block_diag(*(blocks.expand(3, 4, 4)))
    torch.testing.assert_close(rotate_blocks(x, blocks), x @ dense)


def test_small_changes_act_in_16_bits() -> None:
    y = torch.full((4,), 100.0, dtype=torch.bfloat16)
    assert (scaled(y, torch.tensor(1.003)) > y).all() and torch.equal(y * torch.tensor(1.003).bfloat16(), y)


def test_dropped_blocks_become_the_identity() -> None:
    torch.manual_seed(0)
    blocks = blocks_of(10, 3)
    dropped = drop_blocks(blocks, 0.35)
    identity = (dropped == torch.eye(3).double()).all((1, 2))
    assert identity.sum() == 3 and torch.equal(dropped[~identity], blocks[~identity])


def test_random_places_are_distinct_and_depend_on_the_seed() -> None:
    places = random_places(50, 20, 1)
    assert len(places.unique()) == 20 and places.max() < 50
    expected = torch.randperm(50, generator=torch.Generator().manual_seed(1))[:20]
    assert torch.equal(places, expected) and not torch.equal(places, random_places(50, 20, 2))


def test_row_dropout_keeps_the_mean_and_module_dropout_drops_all_rows() -> None:
    torch.manual_seed(0)
    factors = keep_rows(1000, torch.zeros(1), 0.3, 0.0, rescale=True)
    assert factors is not None and len(factors.unique()) == 2
    assert float(factors.mean()) == pytest.approx(1, abs=1e-5)
    dropped = keep_rows(10, torch.zeros(1), 0.0, 1.0, rescale=False)
    assert dropped is not None and not dropped.any()
    assert keep_rows(10, torch.zeros(1), 0.0, 0.0, rescale=True) is None


def test_shapes_and_types() -> None:
    assert weight_shape(base_weight(nn.Conv2d(4, 6, 3, groups=2))) == (6, 2, 3, 3)
    assert weight_shape(base_weight(nn.Embedding(20, 8))) == (8, 20)
    types = {torch.bfloat16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}
    assert {dtype: widened(torch.zeros(1, dtype=dtype)).dtype for dtype in types} == types
