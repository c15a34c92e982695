"""`peftcore.compiled.quantization`: the codes and scales of a formula in PyTorch, bit for bit."""

import pytest
import torch
from bitsandbytes.functional import get_4bit_type
from torch import Tensor

from peftcore.compiled import quantization as compiled_quantization
from peftcore.compiled.quantization import compiled, quantize_4bit

pytestmark = pytest.mark.skipif(not compiled(), reason="nothing is compiled here; the log says why")
VALUES = {kind: get_4bit_type(kind, device="cpu") for kind in ("nf4", "fp4")}


def expected(weight: Tensor, values: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Codes and scales, block by block, in the arithmetic of bitsandbytes."""
    order = values.argsort()
    bounds = (values[order][:-1] + values[order][1:]) / 2
    places, scales = [], []
    for part in weight.flatten().float().split(block):
        scale = part.abs().max()
        is_whole = len(part) == block
        scaled = part * (1 / scale.clamp(min=1e-38)) if is_whole else part / scale.clamp(min=1e-38)
        places.append(torch.bucketize(scaled, bounds))
        scales.append(scale if is_whole else scale.clamp(min=1e-38))
    if weight.numel() % 2:
        places.append(torch.bucketize(torch.zeros(1), bounds))
    codes = order[torch.cat(places)].to(torch.uint8)
    return (codes[::2] << 4 | codes[1::2])[:, None], torch.stack(scales)


def check(weight: Tensor, values: Tensor, block: int) -> None:
    found = quantize_4bit(weight, values, block)
    for one, other in zip(found, expected(weight, values, block), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("count", "block"), [(1, 32), (63, 64), (64, 64), (200, 64), (4097, 4096), (70_001, 128)])
def test_codes_and_scales(count: int, block: int, dtype: torch.dtype, kind: str) -> None:
    check(torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype), VALUES[kind], block)


@pytest.mark.parametrize("kind", VALUES)
def test_the_bounds_between_two_values_belong_to_the_lower_one(kind: str) -> None:
    values = VALUES[kind].sort().values
    bounds = (values[:-1] + values[1:]) / 2
    near = [bounds, bounds.nextafter(torch.ones(15)), bounds.nextafter(-torch.ones(15))]
    check(torch.cat([*near, torch.tensor([1.0])]).repeat(8)[:128].clone(), VALUES[kind], 128)


@pytest.mark.parametrize("block", [64, 256])  # of 256, the only block is not whole
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf, 0.0, 1e-39])
def test_special_numbers(number: float, block: int) -> None:
    weight = torch.randn(3, 43)
    weight[1, 5] = number
    check(weight, VALUES["nf4"], block)
    check(torch.full((129,), number), VALUES["nf4"], block)


def test_a_transposed_weight_is_quantised_as_it_is_read() -> None:
    weight = torch.randn(32, 48).T
    check(weight, VALUES["nf4"], 64)


def test_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_quantization, "LEAST_SHARED_ELEMENTS", 0)
    weight, threads = torch.randn(100_003), torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            check(weight, VALUES["nf4"], 64)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("block", [0, 1, 48, 8192])
def test_blocks_of_other_sizes(block: int) -> None:
    with pytest.raises(ValueError, match=f"got {block}"):
        quantize_4bit(torch.randn(64), VALUES["nf4"], block)
