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


def test_one_product_that_was_delayed_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([50.0, 1.0, 9.0, 2.0, 1.1, 1.0])  # 16 bits and float32 in turn
    monkeypatch.setattr(compute_dtype, "_product_seconds", lambda dtype: next(times))
    assert not compute_dtype._is_slow.__wrapped__(torch.bfloat16)
    assert next(times, None) is None


def test_only_sixteen_bits_on_a_cpu_are_in_question(seconds: dict[torch.dtype, float]) -> None:
    seconds[torch.bfloat16] = 100.0
    assert fast_dtype(torch.bfloat16, "cuda") == torch.bfloat16
    for dtype in (torch.float32, torch.float64, torch.int8):
        assert fast_dtype(dtype) == dtype


def test_a_product_is_measured_on_this_machine() -> None:
    assert compute_dtype._product_seconds(torch.bfloat16) > 0
    assert fast_dtype(torch.bfloat16) in (torch.bfloat16, torch.float32)
