"""Grids of quantised storages: what the codes stand for is what the storage reads."""

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from quantised_layers import quantised
from torch import nn

from peftcore.bases import base_weight
from peftcore.bases.grid import Grid

KINDS = ["nf4", "nf4+double", "fp4", "int8", "Q4_0", "Q4_1", "Q8_0"]


def test_the_nearest_code_is_the_nearest_of_all_values() -> None:
    generator = torch.Generator().manual_seed(0)
    levels = torch.tensor([0.0, 0.3, -1.0, 2.0, 0.5])  # FP4's are not ascending either
    scale = torch.tensor([[0.5, -2.0, 0.0], [1.0, 0.1, 3.0]])
    grid = Grid(levels, scale, torch.randn(2, 3, generator=generator), torch.float32)
    weight = torch.randn(2, 3, generator=generator) * 2
    assert grid.offset is not None
    values = grid.offset[..., None] + scale[..., None] * levels
    best = (values - weight[..., None]).abs().amin(-1)
    torch.testing.assert_close((grid.values(grid.nearest(weight)) - weight).abs(), best)
    order = torch.tensor([2, 0, 1])
    other = grid.permuted(order)
    assert torch.equal(other.nearest(weight[:, order]), grid.nearest(weight)[:, order])
    assert torch.equal(grid.nearest(weight[:, 1], 1), grid.nearest(weight)[:, 1])


@pytest.mark.parametrize("kind", KINDS)
def test_codes_that_are_written_are_what_the_layer_computes_with(kind: str) -> None:
    torch.manual_seed(0)
    layer = quantised(kind)
    base = base_weight(layer)
    before, stored, state = base.read().clone(), layer.weight, base.state()
    grid: Any = base.grid()
    codes = torch.randint(0, len(grid.levels), (32, 64), dtype=torch.uint8)
    base.write_codes(codes)
    assert torch.equal(base.read().float(), grid.values(codes)) and not torch.equal(base.read(), before)
    x = torch.randn(5, 64)
    expected = x @ grid.values(codes).T + layer.bias
    assert (layer(x) - expected).norm() < (0.02 if kind == "int8" else 1e-5) * expected.norm()
    assert torch.equal(base.read().float(), grid.values(codes)), "bitsandbytes moves the codes in its first forward"
    base.restore(state)
    assert layer.weight is stored and torch.equal(base.read(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_nearest_values_are_those_to_which_bitsandbytes_rounds(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(32, 64).to(dtype)
    layer: Any = bnb.nn.Linear4bit(
        64, 32, bias=False, quant_type=kind, compress_statistics=False, compute_dtype=dtype
    ).to(dtype)
    layer.load_state_dict({"weight": weight})
    base = base_weight(layer.to("cpu"))
    grid: Any = base.grid()
    assert base.read().dtype == dtype
    assert torch.equal(grid.values(grid.nearest(weight.float())), base.read().float())


def test_a_storage_without_a_grid_says_so() -> None:
    assert base_weight(nn.Linear(2, 2)).grid() is None
    with pytest.raises(NotImplementedError, match="LinearWeight has no write_codes"):
        base_weight(nn.Linear(2, 2)).write_codes(torch.zeros(2, 2))
    unaligned: Any = bnb.nn.Linear4bit(96, 4, quant_type="nf4", compute_dtype=torch.float32).to("cpu")
    assert base_weight(unaligned).grid() is None
