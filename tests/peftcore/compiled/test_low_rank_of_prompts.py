"""`peftcore.compiled.low_rank_of_prompts`: the formula with PyTorch's roundings, and what is refused."""

from typing import Any

import pytest
import torch
from marked_tensor import Marked
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from peftcore.compiled.low_rank_of_prompts import add_low_rank_to_prompts, compiled, fits_prompts

pytestmark = [
    pytest.mark.skipif(not compiled(), reason="there is no compiled code for this processor; the log says why"),
    pytest.mark.usefixtures("no_grad"),
]
FACTORS = [torch.float32, torch.bfloat16]


def values(rows: int, inputs: int, outputs: int, r: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, x, A and B."""
    generator = torch.Generator().manual_seed(rows + inputs + outputs + r)
    y, x, a, b = (
        torch.randn(shape, generator=generator)
        for shape in ((rows, outputs), (rows, inputs), (r, inputs), (outputs, r))
    )
    return y.bfloat16(), x.bfloat16(), a.to(dtype), b.to(dtype)


def check(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: Any, diagonal: Tensor | None = None, gain: Tensor | None = None
) -> None:
    h = x.double() @ a.bfloat16().double().T
    h = h if diagonal is None else h * diagonal.double()
    exact = y.double() + h.bfloat16().double() @ (b.float() * scaling).bfloat16().double().T
    # sums in float32; an element of h may be rounded to the neighbour
    sizes = (x.double().abs() @ a.double().abs().T) * (1 if diagonal is None else diagonal.double().abs())
    bound = exact.abs() * 2**-8 + (1e-6 * sizes + 2**-8 * h.abs()) @ (b.double() * scaling).abs().T + 1e-30
    if gain is not None:
        exact, bound = exact * gain.double(), bound * gain.double().abs() + 1e-30
    found = y.clone()
    assert add_low_rank_to_prompts(found, x, a, b, scaling, diagonal, gain)
    assert ((found - exact).abs() <= bound).all()
    assert (found.double() - exact).norm() <= 2**-8 * exact.norm() + 1e-30


@pytest.mark.parametrize("dtype", FACTORS)
@pytest.mark.parametrize("rows", [1, 11, 12, 13, 33, 64, 130])
def test_any_number_of_tokens(rows: int, dtype: torch.dtype) -> None:
    check(*values(rows, 64, 48, 16, dtype), 0.5)


@pytest.mark.parametrize("dtype", FACTORS)
@pytest.mark.parametrize("r", [1, 2, 5, 8, 16, 17, 24, 64, 256])
def test_any_rank(r: int, dtype: torch.dtype) -> None:
    check(*values(40, 96, 80, r, dtype), 2.0)


@pytest.mark.parametrize("dtype", FACTORS)
@pytest.mark.parametrize(("inputs", "outputs"), [(2, 1), (30, 15), (32, 16), (34, 17), (62, 31), (70, 33), (576, 1536)])
def test_any_size(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    check(*values(37, inputs, outputs, 16, dtype), 1.0)


@pytest.mark.parametrize("dtype", FACTORS)
def test_diagonal_and_gain(dtype: torch.dtype) -> None:
    given = values(40, 64, 50, 12, dtype)
    diagonal, gain = torch.randn(12, 1), torch.randn(50)
    check(*given, 0.5, diagonal.squeeze(1))
    check(*given, torch.tensor(0.5), None, gain)
    check(*given, 0.5, diagonal.squeeze(1).to(dtype), gain.to(dtype))


def test_shapes_and_strides() -> None:
    y, x, a, b = values(24, 128, 20, 8, torch.float32)
    expected = y.clone()
    assert add_low_rank_to_prompts(expected, x[:, ::2].contiguous(), a[:, ::2].contiguous(), b, 1.0)
    found = y.clone().view(2, 12, 20)
    assert add_low_rank_to_prompts(found, x[:, ::2].view(2, 12, 64), a[:, ::2].contiguous(), b, 1.0)
    assert torch.equal(found.view(24, 20), expected)


def test_numbers_that_are_none_stay_in_their_row() -> None:
    y, x, a, b = values(40, 32, 20, 8, torch.float32)
    x[3, 5] = torch.nan
    assert add_low_rank_to_prompts(y, x, a, b, 1.0)
    assert y[3].isnan().all() and y[torch.arange(40) != 3].isfinite().all()


def test_infinite_inputs_with_an_odd_rank() -> None:
    y, x, a, b = values(40, 32, 20, 5, torch.float32)
    x[3, 5] = torch.inf
    a[1:] = 0
    a[:, 5] = 1
    b.abs_()
    assert add_low_rank_to_prompts(y, x, a, b, 1.0)
    assert (y[3] == torch.inf).all()


def test_any_number_of_threads() -> None:
    y, x, a, b = values(100, 64, 48, 16, torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(y.clone())
            assert add_low_rank_to_prompts(found[-1], x, a, b, 1.0)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize(
    "change",
    [
        lambda y, x, a, b: (y.float(), x, a, b),
        lambda y, x, a, b: (y, x.float(), a, b),
        lambda y, x, a, b: (y, x, a.double(), b.double()),
        lambda y, x, a, b: (y, x, a.bfloat16(), b),
        lambda y, x, a, b: (y.as_subclass(Marked), x, a, b),
        lambda y, x, a, b: (y, x.as_subclass(Marked), a, b),
        lambda y, x, a, b: (y, x, a.as_subclass(Marked), b),
        lambda y, x, a, b: (y, x.to("meta"), a, b),
        lambda y, x, a, b: (y[1:], x, a, b),
        lambda y, x, a, b: (y.T.contiguous().T, x, a, b),
        lambda y, x, a, b: (y, x, a.T.contiguous().T, b),
        lambda y, x, a, b: (y, x, a[:-1], b),
        lambda y, x, a, b: (y, x[:, :-1], a[:, :-1].contiguous(), b),
        lambda y, x, a, b: (y[:0], x[:0], a, b),
        lambda y, x, a, b: (y, x, a.repeat(300, 1), b.repeat(1, 300)),
    ],
)
def test_what_does_not_fit_is_left_to_pytorch(change: Any) -> None:
    y, *given = values(40, 32, 20, 4, torch.float32)
    assert add_low_rank_to_prompts(y.clone(), *given, 1.0)  # type: ignore[call-arg]
    changed, *others = change(y, *given)
    before = changed.clone()
    assert not add_low_rank_to_prompts(changed, *others, 1.0)  # type: ignore[call-arg]
    assert torch.equal(changed, before)


@pytest.mark.parametrize(
    "vectors", [{"diagonal": torch.ones(3)}, {"gain": torch.ones(21)}, {"gain": torch.ones(20).half()}]
)
def test_vectors_of_other_sizes_and_types(vectors: Any) -> None:
    y, x, a, b = values(40, 32, 20, 4, torch.float32)
    assert not add_low_rank_to_prompts(y, x, a, b, 1.0, **vectors)


def test_whoever_must_see_the_operations_sees_them() -> None:
    _, x, a, b = values(40, 32, 20, 4, torch.float32)
    assert fits_prompts(x, a, b)
    with torch.enable_grad():
        assert not fits_prompts(x, a, b)
    with FlopCounterMode(display=False):
        assert not fits_prompts(x, a, b)
