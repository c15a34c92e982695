"""Float32 takes the place of 16 bits only on a CPU whose products in 16 bits are several times slower."""

import pytest
import torch

from peftcore.bases import compute_dtype, fast_dtype


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> dict[torch.dtype, float]:
    """How long a product takes in each type."""
    given = {torch.float32: 1.0, torch.bfloat16: 1.0, torch.float16: 1.0}
    monkeypatch.setattr(compute_dtype, "_product_seconds", given.__getitem__)
    monkeypatch.setattr(compute_dtype, "_is_slow", compute_dtype._is_slow.__wrapped__)
    return given


@pytest.mark.parametrize(("times", "expected"), [(0.5, torch.bfloat16), (3.9, torch.bfloat16), (4.1, torch.float32)])
def test_the_type_that_is_fast(times: float, expected: torch.dtype, seconds: dict[torch.dtype, float]) -> None:
    seconds[torch.bfloat16] = times
    assert fast_dtype(torch.bfloat16) == expected
    assert fast_dtype(torch.float16) == torch.float16


@pytest.mark.parametrize(
    ("narrow", "wide", "slow"),
    [
        pytest.param([50.0, 9.0, 1.1, 9.0, 9.0], [1.0, 2.0, 1.0, 1.0, 1.0], False, id="products in 16 bits"),
        pytest.param([80.0] * 15, [90.0, 40.0, 1.0, 1.0, 2.0, *[1.0] * 10], True, id="first products in float32"),
        pytest.param([9.0] * 14 + [1.0], [1.0] * 15, False, id="all but the last one in 16 bits"),
    ],
)
def test_products_that_were_delayed_decide_nothing(
    narrow: list[float], wide: list[float], slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {torch.bfloat16: iter(narrow), torch.float32: iter(wide)}
    monkeypatch.setattr(compute_dtype, "_product_seconds", lambda dtype: next(times[dtype]))
    assert compute_dtype._is_slow.__wrapped__(torch.bfloat16) is slow
    assert next(times[torch.bfloat16], None) is None


def test_only_sixteen_bits_on_a_cpu_are_in_question(seconds: dict[torch.dtype, float]) -> None:
    seconds[torch.bfloat16] = 100.0
    assert fast_dtype(torch.bfloat16, "cuda") == torch.bfloat16
    for dtype in (torch.float32, torch.float64, torch.int8):
        assert fast_dtype(dtype) == dtype


def test_a_product_is_measured_on_this_machine() -> None:
    assert compute_dtype._product_seconds(torch.bfloat16) > 0
    assert fast_dtype(torch.bfloat16) in (torch.bfloat16, torch.float32)
