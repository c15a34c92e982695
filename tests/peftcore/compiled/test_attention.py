"""`peftcore.compiled.attention`: the formula in float64, and what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from marked_tensor import Marked
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from peftcore.compiled import attention as compiled_attention
from peftcore.compiled.attention import (
    Functions,
    attention_of_one_token,
    attention_of_prompts,
    compiled,
    vector_width,
)

pytestmark = [
    pytest.mark.skipif(not compiled(), reason="nothing is compiled here; the log says why"),
    pytest.mark.usefixtures("no_grad"),
]
TYPES = [torch.float32, torch.bfloat16]


def given(
    rows: int,
    heads: int,
    key_heads: int,
    tokens: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    queries: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values."""
    torch.manual_seed(rows + heads + tokens + width)
    k, v = torch.randn(2, rows, key_heads, tokens, width).to(dtype)
    return torch.randn(rows, heads, queries, width).to(dtype), k, v


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """The formula in float64, (B, T, H, d)."""
    group = q.shape[1] // k.shape[1]
    k, v = (one.double().repeat_interleave(group, 1) for one in (k, v))
    scores = scaling * q.double() @ k.transpose(2, 3)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def in_threads(compute: Callable[[], Tensor | None], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """What `compute` returns, which must have the same bits with 1, 2 and 5 threads."""
    monkeypatch.setattr(compiled_attention, "LEAST_SHARED_WORK", 0)
    found: list[Any] = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(compute())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])
    return found[0]


def assert_exact(found: Tensor | None, expected: Tensor, rounding: float = 2e-6) -> None:
    assert found is not None and found.shape == expected.shape and found.is_contiguous()
    tolerance = rounding if found.dtype == torch.float32 else 2**-8
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance / 2)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("rows", "heads", "key_heads", "tokens", "vectors"),
    [(1, 1, 1, 1, 1), (3, 9, 3, 33, 4), (2, 4, 4, 16, 2), (2, 7, 1, 21, 3), (16, 4, 2, 90, 5)],
)
def test_formula(
    rows: int, heads: int, key_heads: int, tokens: int, vectors: int, masked: bool, dtype: torch.dtype
) -> None:
    q, k, v = given(rows, heads, key_heads, tokens, vectors * vector_width(), dtype)
    mask = None
    if masked:
        mask = torch.rand(rows, 1, 1, tokens) < 0.6
        mask[..., -1] = True
    assert_exact(attention_of_one_token(q, k, v, mask, 0.3), exact(q, k, v, mask, 0.3))
    large = 40 * q  # scores of hundreds, so that nearly all of the weight is at one token
    assert_exact(attention_of_one_token(large, k, v, mask, 0.3), exact(large, k, v, mask, 0.3), rounding=1e-4)


def test_tensors_lie_where_a_cache_and_a_model_leave_them() -> None:
    q, k, v = given(3, 4, 2, 20, 32)
    mask = torch.rand(1, 1, 1, 20) < 0.7
    expected = attention_of_one_token(q, k, v, mask, 0.2)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    k, v = (F.pad(one, (0, 0, 0, 9))[:, :, :20] for one in (k, v))
    assert not k.is_contiguous()
    for one in (mask, mask.expand(3, 1, 1, 20), F.pad(mask.expand(3, 1, 1, 20), (0, 5))[..., :20]):
        found = attention_of_one_token(q, k, v, one, 0.2)
        assert found is not None and expected is not None and torch.equal(found, expected)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_row_has_the_same_bits_alone_and_in_any_number_of_threads(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = given(11, 6, 2, 50, 64, dtype)
    found = in_threads(lambda: attention_of_one_token(q, k, v, None, 0.1), monkeypatch)
    for row in range(len(q)):
        one = slice(row, row + 1)
        alone = attention_of_one_token(q[one], k[one], v[one], None, 0.1)
        assert alone is not None and torch.equal(alone[0], found[row])


def test_numbers_that_are_none_stay_in_their_row() -> None:
    q, k, v = given(4, 2, 1, 40, 32)
    k[0, 0, 3] = torch.nan
    v[1, 0, 39] = torch.inf
    k[2, 0, 5] = torch.inf
    found = attention_of_one_token(q, k, v, None, 1.0)
    assert found is not None
    assert found[0].isnan().all() and found[1].isinf().all() and found[2].isnan().any() and found[3].isfinite().all()


def test_a_row_without_visible_tokens_gets_zeros() -> None:
    q, k, v = given(2, 2, 1, 5, 32)
    mask = torch.tensor([[True] * 5, [False] * 5])[:, None, None]
    found = attention_of_one_token(q, k, v, mask, 1.0)
    assert found is not None and (found[1] == 0).all() and (found[0] != 0).all()


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q.double(), k.double(), v.double()),
        lambda q, k, v: (q.half(), k.half(), v.half()),
        lambda q, k, v: (q, k.bfloat16(), v),
        lambda q, k, v: (q, k, v.bfloat16()),
        lambda q, k, v: (q.as_subclass(Marked), k, v),
        lambda q, k, v: (q, k.to("meta"), v),
        lambda q, k, v: (q.repeat(1, 1, 2, 1), k, v),
        lambda q, k, v: (q[:, :3], k, v),
        lambda q, k, v: (q[:1], k, v),
        lambda q, k, v: (q, k, v[:, :, 1:]),
        lambda q, k, v: (q, k[:, :, :0], v[:, :, :0]),
        lambda q, k, v: (q, k.transpose(2, 3).contiguous().transpose(2, 3), v),
        lambda q, k, v: (q[..., 1:], k[..., 1:], v[..., 1:]),
        lambda q, k, v: (q, k[0], v[0]),
    ],
)
def test_what_does_not_fit_is_left_to_pytorch(change: Any) -> None:
    fitting = given(3, 4, 2, 6, 32)
    assert attention_of_one_token(*fitting, None, 1.0) is not None
    assert attention_of_one_token(*change(*fitting), None, 1.0) is None


@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(3, 1, 1, 6),
        torch.ones(3, 4, 1, 6, dtype=torch.bool),
        torch.ones(2, 1, 1, 6, dtype=torch.bool),
        torch.ones(3, 1, 1, 5, dtype=torch.bool),
        torch.ones(3, 6, dtype=torch.bool),
        torch.ones(3, 1, 1, 12, dtype=torch.bool)[..., ::2],
    ],
)
def test_masks_that_do_not_fit_are_left_to_pytorch(mask: Tensor) -> None:
    assert attention_of_one_token(*given(3, 4, 2, 6, 32), mask, 1.0) is None


def test_whoever_must_see_the_operations_sees_them() -> None:
    q, k, v = given(1, 2, 1, 5, 32)
    with torch.enable_grad():
        assert attention_of_one_token(q, k, v, None, 1.0) is None
    with FlopCounterMode(display=False):
        assert attention_of_one_token(q, k, v, None, 1.0) is None
    seen: list[Tensor | None] = []
    torch.func.vmap(lambda one: (seen.append(attention_of_one_token(q, k, v, None, 1.0)), one)[1])(q)
    assert seen == [None]


def test_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_attention, "compiled", lambda: Functions(lambda *_: 0, lambda *_: 0))
    with pytest.raises(MemoryError, match="attention weights of 5 tokens"):
        attention_of_one_token(*given(1, 2, 1, 5, 32), None, 1.0)
    with pytest.raises(MemoryError, match="attention of 3 queries and 5 tokens"):
        attention_of_prompts(*given(1, 2, 1, 5, 32, queries=3), None, False, 1.0)


# -- attention_of_prompts ------------------------------------------------------------------------------------------


def masks(rows: int, queries: int, tokens: int) -> dict[str, Tensor | None]:
    """Masks by kind; with "causal", the function makes the mask itself. Some rows begin with padding."""
    causal = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries).expand(rows, 1, -1, -1).clone()
    padded = causal.clone()
    padded[0, :, :, : tokens // 2] = False
    padded[..., -1] = True
    window = causal & ~torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries - 7)
    some = torch.rand(rows, 1, queries, tokens) < 0.2
    some[..., tokens // 2] = True
    return {"none": None, "causal": None, "cache": causal, "padded": padded, "window": window, "some": some}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", masks(1, 1, 1))
@pytest.mark.parametrize(
    ("rows", "heads", "key_heads", "queries", "tokens", "vectors"),
    [(1, 1, 1, 1, 1, 1), (3, 9, 3, 33, 33, 4), (2, 4, 4, 5, 70, 2), (2, 7, 1, 21, 150, 3), (1, 4, 2, 130, 130, 5)],
)
def test_formula_of_prompts(
    rows: int, heads: int, key_heads: int, queries: int, tokens: int, vectors: int, kind: str, dtype: torch.dtype
) -> None:
    q, k, v = given(rows, heads, key_heads, tokens, vectors * vector_width(), dtype, queries)
    mask = masks(rows, queries, tokens)[kind]
    shown = torch.ones(queries, tokens, dtype=torch.bool).tril()[None, None] if kind == "causal" else mask
    assert_exact(attention_of_prompts(q, k, v, mask, kind == "causal", 0.3), exact(q, k, v, shown, 0.3), rounding=1e-5)
    large = 40 * q  # scores of hundreds, so that nearly all of the weight is at one token
    found = attention_of_prompts(large, k, v, mask, kind == "causal", 0.3)
    assert_exact(found, exact(large, k, v, shown, 0.3), rounding=1e-4)


def test_tensors_of_prompts_lie_where_a_cache_and_a_model_leave_them() -> None:
    q, k, v = given(3, 4, 2, 20, 32, queries=6)
    mask = torch.rand(1, 1, 6, 20) < 0.7
    mask[..., 0] = True
    expected = attention_of_prompts(q, k, v, mask, False, 0.2)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    k, v = (F.pad(one, (0, 0, 0, 9))[:, :, :20] for one in (k, v))
    for one in (mask, mask.expand(3, 1, 6, 20), F.pad(mask.expand(3, 1, 6, 20), (0, 5, 0, 2))[..., :6, :20]):
        found = attention_of_prompts(q, k, v, one, False, 0.2)
        assert found is not None and expected is not None and torch.equal(found, expected)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_query_has_the_same_bits_alone_and_in_any_number_of_threads(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = given(3, 6, 2, 100, 64, dtype, queries=90)
    mask = torch.rand(3, 1, 90, 100) < 0.5
    found = in_threads(lambda: attention_of_prompts(q, k, v, mask, False, 0.1), monkeypatch)
    for query in (0, 1, 40, 89):
        one = slice(query, query + 1)
        alone = attention_of_prompts(q[1:2, :, one], k[1:2], v[1:2], mask[1:2, :, one], False, 0.1)
        assert alone is not None and torch.equal(alone[0, 0], found[1, query])


def test_numbers_that_are_none_reach_only_the_queries_that_see_them() -> None:
    q, k, v = given(2, 2, 1, 80, 32, queries=80)
    k[0, 0, 30] = torch.nan
    v[0, 0, 60] = torch.inf
    found = attention_of_prompts(q, k, v, None, True, 1.0)
    assert found is not None and found[0, 30:].isnan().all() and found[0, :24].isfinite().all()
    assert found[1].isfinite().all()


def test_a_query_without_visible_tokens_gets_zeros() -> None:
    q, k, v = given(2, 2, 1, 9, 32, queries=4)
    mask = torch.ones(2, 1, 4, 9, dtype=torch.bool)
    mask[1, :, 2] = False
    found = attention_of_prompts(q, k, v, mask, False, 1.0)
    assert found is not None and (found[1, 2] == 0).all() and (found[0] != 0).all() and (found[1, 3] != 0).all()


def test_prompts_that_do_not_fit_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = given(2, 4, 2, 6, 32, queries=5)
    mask = torch.ones(2, 1, 5, 6, dtype=torch.bool)
    assert attention_of_prompts(q, k, v, mask, False, 1.0) is not None
    assert attention_of_prompts(q, k, v, mask, True, 1.0) is None
    assert attention_of_prompts(q, k[:, :, :4], v[:, :, :4], None, True, 1.0) is None
    assert attention_of_prompts(q[:, :, :0], k, v, None, False, 1.0) is None
    assert attention_of_prompts(q, k, v, mask[:, :, :4], False, 1.0) is None
    assert attention_of_prompts(q, k, v, mask.float(), False, 1.0) is None
    assert attention_of_prompts(q.double(), k.double(), v.double(), mask, False, 1.0) is None
    with torch.enable_grad():
        assert attention_of_prompts(q, k, v, mask, False, 1.0) is None
    monkeypatch.setattr(compiled_attention, "MOST_TOKENS", 5)
    assert attention_of_prompts(q, k, v, mask, False, 1.0) is None
