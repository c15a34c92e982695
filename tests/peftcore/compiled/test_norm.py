"""`peftcore.compiled.norm`: transformers' layer, and what is refused."""

from typing import Any

import pytest
import torch
from marked_tensor import Marked
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from peftcore.compiled import norm as compiled_norm
from peftcore.compiled.norm import compiled, rms_norm

pytestmark = [
    pytest.mark.skipif(not compiled(), reason="nothing is compiled here; the log says why"),
    pytest.mark.usefixtures("no_grad"),
]
TYPES = [torch.float32, torch.bfloat16]


def values(rows: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """x and w."""
    torch.manual_seed(rows + width)
    return (3 * torch.randn(rows, 1, width)).to(dtype), torch.randn(width).to(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (2, 1), (3, 15), (5, 77), (40, 576)])
def test_transformers_layer(rows: int, width: int, dtype: torch.dtype) -> None:
    x, weight = values(rows, width, dtype)
    layer = LlamaRMSNorm(width, 1e-3).to(dtype)
    layer.weight.copy_(weight)
    found, expected = rms_norm(x, weight, 1e-3), layer(x)
    assert found is not None and found.dtype == dtype
    # the sum of squares is added in another order, so that a bfloat16 may be rounded to the neighbour
    torch.testing.assert_close(found, expected, rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=0)
    assert dtype == torch.float32 or (found == expected).double().mean() > 0.99


def test_numbers_that_are_none_stay_in_their_row() -> None:
    x, weight = values(3, 20)
    x[0, 0, 3], x[1] = torch.nan, 0
    found = rms_norm(x, weight, 1e-6)
    assert found is not None
    assert found[0].isnan().all() and (found[1] == 0).all() and found[2].isfinite().all()


@pytest.mark.parametrize("dtype", TYPES)
def test_any_number_of_threads(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = values(50, 33, dtype)
    threads = torch.get_num_threads()
    monkeypatch.setattr(compiled_norm, "LEAST_SHARED_ELEMENTS", 0)
    found: list[Any] = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(rms_norm(x, weight, 1e-6))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize(
    "change",
    [
        lambda x, w: (x.double(), w.double()),
        lambda x, w: (x.bfloat16(), w),
        lambda x, w: (x, w.bfloat16()),
        lambda x, w: (x.as_subclass(Marked), w),
        lambda x, w: (x, w.to("meta")),
        lambda x, w: (x[..., 1:], w[1:]),
        lambda x, w: (x, w[1:]),
        lambda x, w: (x, w.repeat(2)[::2]),
        lambda x, w: (x[:0], w),
    ],
)
def test_what_does_not_fit_is_left_to_pytorch(change: Any) -> None:
    fitting = values(3, 8)
    assert rms_norm(*fitting, 1e-6) is not None
    assert rms_norm(*change(*fitting), 1e-6) is None


def test_whoever_must_see_the_operations_sees_them() -> None:
    x, weight = values(3, 8)
    with torch.enable_grad():
        assert rms_norm(x, weight, 1e-6) is None
    with FlopCounterMode(display=False):
        assert rms_norm(x, weight, 1e-6) is None
