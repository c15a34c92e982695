"""`peftcore.compiled.packed_product`: the product in float64, and what is refused."""

from typing import Any

import pytest
import torch
from marked_tensor import Marked
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from peftcore.compiled.packed_product import compiled, packed_product

pytestmark = [
    pytest.mark.skipif(not compiled(), reason="there is no compiled code for this processor; the log says why"),
    pytest.mark.usefixtures("no_grad"),
]


def values(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    function = packed_product(weight)
    assert function is not None
    return function(x, bias)


def check(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    found = product(x, weight, bias)
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert found is not None and found.dtype == torch.bfloat16 and found.is_contiguous()
    # one rounding to bfloat16, and sums in float32
    bound = expected.abs() * 2**-8 + 1e-6 * (x.double().abs() @ weight.double().abs().T) + 1e-30
    assert ((found - expected).abs() <= bound).all()


@pytest.mark.parametrize("rows", range(1, 40))
def test_any_number_of_tokens(rows: int) -> None:
    check(values(rows, 70), values(65, 70))


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (1, 7), (31, 2), (32, 64), (33, 65), (200, 24), (576, 1536)])
def test_any_size(outputs: int, inputs: int, has_bias: bool) -> None:
    bias = values(outputs) if has_bias else None
    for shape in ((1,), (13,), (2, 3)):
        check(values(*shape, inputs), values(outputs, inputs), bias)


def test_strides() -> None:
    x, weight, bias = values(3, 5, 128), values(48, 64), values(96)
    check(x[:, -1:, ::2], weight, bias[::2])
    check(x[..., :64].transpose(0, 1), weight)
    check(x[..., :64], values(64, 48).T)
    check(values(64), weight)


def test_nothing_is_written_beside_the_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = values(5, 8), values(37, 8)
    memory = torch.full((5 * 37 + 64,), 7.0, dtype=torch.bfloat16)
    monkeypatch.setattr(Tensor, "new_empty", lambda *_: memory[32 : 32 + 5 * 37].view(5, 37))
    found = product(x, weight)
    monkeypatch.undo()
    assert found is not None and found.data_ptr() == memory[32:].data_ptr()
    assert (memory[:32] == 7).all() and (memory[-32:] == 7).all()


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_special_numbers_stay_in_their_row(number: float) -> None:
    x, weight = values(4, 16), values(40, 16)
    x[1, 3] = number
    found = product(x, weight)
    assert found is not None
    assert torch.equal(found[1], (x @ weight.T)[1]) or found[1].isnan().all()
    assert found[[0, 2, 3]].isfinite().all()


def test_any_number_of_threads() -> None:
    x, weight, threads = values(20, 64), values(3000, 64), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(product(x, weight))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        lambda x, b: (x.float(), b),
        lambda x, b: (x, b.float()),
        lambda x, b: (x.as_subclass(Marked), b),
        lambda x, b: (x.to("meta"), b),
        lambda x, b: (x, b.to("meta")),
        lambda x, b: (x[..., 1:], b),
        lambda x, b: (x, b[1:]),
        lambda x, b: (x[:0], b),
        lambda x, b: (x[0, 0], b),
    ],
)
def test_what_does_not_fit_is_left_to_pytorch(change: Any) -> None:
    x, weight, bias = values(3, 8), values(6, 8), values(6)
    assert product(x, weight, bias) is not None
    changed = change(x, bias)
    assert product(changed[0], weight, changed[1]) is None


def test_whoever_must_see_the_operations_sees_them() -> None:
    x, weight = values(3, 8), values(6, 8)
    with torch.enable_grad():
        assert product(x, weight) is None
    with FlopCounterMode(display=False):
        assert product(x, weight) is None
