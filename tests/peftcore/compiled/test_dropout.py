"""`peftcore.compiled.dropout`: compiled C has the bits of NumPy and PyTorch."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from marked_tensor import Marked
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from peftcore.compiled import dropout as compiled_dropout
from peftcore.compiled.dropout import DropoutMask, compiled, draw_bits

needs_compiler = pytest.mark.skipif(not compiled(), reason="nothing is compiled here; the log says why")
TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.fixture(params=[pytest.param(True, marks=needs_compiler), False], ids=["compiled", "NumPy and PyTorch"])
def _code(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test with C and without."""
    if not request.param:
        monkeypatch.setattr(compiled_dropout, "compiled", lambda: None)


@pytest.fixture
def _three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    monkeypatch.setattr(compiled_dropout, "LEAST_SHARED_ELEMENTS", 0)
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


def values(rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x, and its mask as bytes."""
    generator = torch.Generator().manual_seed(rows + width)
    x = torch.randn(rows, width, generator=generator).to(dtype)
    x.view(-1)[:3] = torch.tensor([torch.nan, torch.inf, -0.0])[: x.numel()]
    return x, torch.randint(2, (rows, width), dtype=torch.uint8, generator=generator)


def same_bits(one: Tensor, other: Tensor) -> bool:
    kind = INTEGERS[one.element_size()]
    return one.dtype == other.dtype and torch.equal(one.view(kind), other.view(kind))


def expected(x: Tensor, keep: Tensor) -> Tensor:
    return torch.where(keep == 1, x, torch.zeros((), dtype=x.dtype))


@pytest.mark.usefixtures("_code")
@pytest.mark.parametrize("threshold", [0, 1, 13, 255, 256])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 511, 512, 513, 5_003])
def test_bits_are_drawn_from_numpys_generator(count: int, threshold: int) -> None:
    random = np.random.SFC64(2**40 + count).random_raw(count // 8 + 1).view(np.uint8)[:count]
    bits = draw_bits(2**40 + count, threshold, count)
    assert bits.tolist() == np.packbits(random.astype(int) >= threshold).tolist()
    keep = DropoutMask(torch.Size((1, count)), bits).keep
    assert keep.tolist() == [[int(byte >= threshold) for byte in random]]


@pytest.mark.usefixtures("_code", "no_grad")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 5), (7, 16), (9, 33), (300, 130)])
def test_dropped_elements_are_zero_and_others_keep_their_bits(rows: int, width: int, dtype: torch.dtype) -> None:
    x, keep = values(rows, width, dtype)
    mask = DropoutMask(x.shape, DropoutMask.packed(keep).bits)
    before, y = x.clone(), mask.apply(x)
    assert same_bits(y, expected(x, keep)) and same_bits(x, before)
    columns = x.T.contiguous().T  # strides (1, rows)
    assert same_bits(mask.apply(columns), expected(x, keep))
    assert mask.apply_(x) is x and same_bits(x, y)


@pytest.mark.usefixtures("_code", "no_grad", "_three_threads")
@pytest.mark.parametrize("dtype", TYPES)
def test_several_threads(dtype: torch.dtype) -> None:
    x, keep = values(257, 401, dtype)
    mask = DropoutMask(x.shape, DropoutMask.packed(keep).bits)
    assert same_bits(mask.apply(x), expected(x, keep)) and same_bits(mask.apply_(x), expected(x, keep))


@pytest.mark.usefixtures("_code")
def test_gradients_are_masked_too() -> None:
    x, keep = values(6, 10, torch.float64)
    x.nan_to_num_(posinf=1).requires_grad_()
    DropoutMask.packed(keep).apply(x).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, keep.double())


@needs_compiler
@pytest.mark.usefixtures("no_grad")
def test_what_c_cannot_do_is_done_by_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, keep = values(4, 8, torch.float32)
    mask, calls = DropoutMask.packed(keep), []
    functions = compiled()
    assert functions is not None
    counted = functions._replace(apply=lambda *given: (calls.append(1), functions.apply(*given)))
    monkeypatch.setattr(compiled_dropout, "compiled", lambda: counted)
    mask.apply(x)
    assert len(calls) == 1
    refused: list[Any] = [x.double(), x.as_subclass(Marked)]
    for each in refused:
        assert same_bits(mask.apply(each).as_subclass(Tensor), expected(each.as_subclass(Tensor), keep))
    with FlopCounterMode(display=False):
        assert same_bits(mask.apply(x), expected(x, keep))
    assert len(calls) == 1
