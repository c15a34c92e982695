"""Dequantised blocks, and blocks with other codes, have the bits of the `gguf` package."""

import gguf
import pytest
import torch
from gguf.quants import dequantize
from quantised_layers import random_rows

from peftcore.bases import gguf_blocks
from peftcore.bases.gguf_blocks import FORMATS


@pytest.mark.parametrize("outputs", [24, 13])  # eight outputs at a time, and one by one
@pytest.mark.parametrize("name", FORMATS)
def test_values_have_the_bits_of_the_reference(name: str, outputs: int) -> None:
    rows, block = random_rows(name, outputs, 512), FORMATS[name]
    kind = gguf.GGMLQuantizationType[name]
    assert (block.number, (block.weights, block.size)) == (kind.value, gguf.GGML_QUANT_SIZES[kind])
    weight = block.dequantize(block.pack(rows))
    expected = torch.from_numpy(dequantize(rows.numpy(), kind))
    assert weight.shape == (outputs, 512)
    assert torch.equal(weight.contiguous().view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("name", FORMATS)
def test_packing_loses_nothing(name: str) -> None:
    rows, block = random_rows(name, 16, 256), FORMATS[name]
    planes = block.pack(rows)
    assert planes.numel() == rows.numel() == 16 * 256 // block.weights * block.size
    assert torch.equal(block.rows(planes), rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_parts_that_fit_the_cache_give_the_same_values(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    block = FORMATS["Q5_1"]
    planes = block.pack(random_rows("Q5_1", 16, 7 * 32))
    whole = block.dequantize(planes)
    monkeypatch.setattr(gguf_blocks, "CHUNK", 2 * 32 * 16)
    assert torch.equal(block.dequantize(planes, dtype), whole.to(dtype))


@pytest.mark.parametrize("outputs", [24, 13])
@pytest.mark.parametrize("name", FORMATS)
def test_the_reference_reads_written_codes_as_the_grids_values(name: str, outputs: int) -> None:
    block = FORMATS[name]
    planes = block.pack(random_rows(name, outputs, 512))
    grid, before = block.grid(planes), planes.clone()
    codes = torch.randint(0, len(grid.levels), (outputs, 512), dtype=torch.uint8)
    new = block.with_codes(planes, codes)
    expected = torch.from_numpy(dequantize(block.rows(new).numpy(), gguf.GGMLQuantizationType[name]))
    assert torch.equal(grid.values(codes), expected) and not torch.equal(new, planes)
    after = block.grid(new)
    assert torch.equal(after.scale, grid.scale) and (grid.offset is None or torch.equal(after.offset, grid.offset))
    assert torch.equal(planes, before), "the packed weight itself stays"
    assert {len(grid.levels)} == {2 ** int(name[1])}


@pytest.mark.parametrize("name", FORMATS)
def test_the_codes_of_a_weights_own_values_are_its_blocks(name: str) -> None:
    block = FORMATS[name]
    planes = block.pack(random_rows(name, 16, 512))
    weight, grid = block.dequantize(planes), block.grid(planes)
    again = block.with_codes(planes, grid.nearest(weight))
    if name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
        assert torch.equal(again, planes)
    assert torch.equal(block.dequantize(again), weight), "a scale of 0 leaves the code open, not the value"
