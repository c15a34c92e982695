"""`peftcore.compiled.rotary`: transformers' rotary embeddings, and what is refused."""

from typing import Any

import pytest
import torch
from marked_tensor import Marked
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from peftcore.compiled import rotary as compiled_rotary
from peftcore.compiled.rotary import compiled, rotate_positions

pytestmark = [
    pytest.mark.skipif(not compiled(), reason="nothing is compiled here; the log says why"),
    pytest.mark.usefixtures("no_grad"),
]
TYPES = [torch.float32, torch.bfloat16]


def values(
    rows: int, tokens: int, width: int, dtype: torch.dtype = torch.float32, tables: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, cos and sin; q and k lie as an attention layer makes them, and the halves of a table differ."""
    torch.manual_seed(rows + tokens + width)
    q, k = (torch.randn(rows, tokens, heads, width).to(dtype).transpose(1, 2) for heads in (4, 2))
    angles = 6 * torch.rand(tables, tokens, width)
    return q, k, angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "tokens", "width"), [(1, 1, 64), (3, 9, 64), (2, 5, 2), (2, 3, 10), (2, 20, 80)])
@pytest.mark.parametrize("shared", [True, False])
def test_transformers_function(rows: int, tokens: int, width: int, shared: bool, dtype: torch.dtype) -> None:
    given = values(rows, tokens, width, dtype, 1 if shared else rows)
    found, expected = rotate_positions(*given), apply_rotary_pos_emb(*given)
    assert found is not None
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype and (tokens == 1 or one.stride() == other.stride())
        # a compiler may round a product and a sum of float32 at once
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6 if dtype == torch.float32 else 0)


@pytest.mark.parametrize("dtype", TYPES)
def test_any_number_of_threads(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    given, threads = values(3, 31, 48, dtype, 3), torch.get_num_threads()
    monkeypatch.setattr(compiled_rotary, "LEAST_SHARED_ELEMENTS", 0)
    found: list[Any] = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(torch.cat([part.flatten() for part in rotate_positions(*given) or ()]))
    finally:
        torch.set_num_threads(threads)
    assert len(found[0]) and all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, c, s: (q.double(), k.double(), c.double(), s.double()),
        lambda q, k, c, s: (q.bfloat16(), k, c, s),
        lambda q, k, c, s: (q, k, c.bfloat16(), s.bfloat16()),
        lambda q, k, c, s: (q.as_subclass(Marked), k, c, s),
        lambda q, k, c, s: (q, k.to("meta"), c, s),
        lambda q, k, c, s: (q, k, c[..., :4], s[..., :4]),
        lambda q, k, c, s: (q, k, c[0], s[0]),
        lambda q, k, c, s: (q, k, c, s.repeat(1, 2, 1)[:, ::2]),
        lambda q, k, c, s: (q[:, :, :0], k[:, :, :0], c[:, :0], s[:, :0]),
        lambda q, k, c, s: (q, k[:, :, 1:], c, s),
        lambda q, k, c, s: (q[..., 1:], k[..., 1:], c[..., 1:], s[..., 1:]),
        lambda q, k, c, s: (q.repeat_interleave(2, 3)[..., ::2], k, c, s),
        lambda q, k, c, s: (q[:, ::2], k, c, s),
    ],
)
def test_what_does_not_fit_is_left_to_pytorch(change: Any) -> None:
    fitting = values(2, 3, 8)
    assert rotate_positions(*fitting) is not None
    assert rotate_positions(*change(*fitting)) is None


def test_whoever_must_see_the_operations_sees_them() -> None:
    given = values(2, 3, 8)
    with torch.enable_grad():
        assert rotate_positions(*given) is None
    with FlopCounterMode(display=False):
        assert rotate_positions(*given) is None
