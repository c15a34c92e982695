"""`peftcore.compiled.low_rank`: the formula, and what is refused."""

import ctypes
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from marked_tensor import Marked
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from peftcore import AdaLoraConfig, LoraConfig, get_peft_model
from peftcore.compiled import low_rank as compiled_low_rank
from peftcore.compiled.low_rank import (
    MOST_WORK,
    MOST_WORK_BY_ROW,
    RowTable,
    add_low_rank,
    add_low_rank_by_row,
    compiled,
    factors_of,
    openmp,
    row_table,
)

pytestmark = pytest.mark.skipif(not compiled(), reason="nothing is compiled here; the log says why")
TYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]
"""Types of x and y, and of A and B."""
types = pytest.mark.parametrize(("dtype", "factors"), TYPES)


def add(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    diagonal: Tensor | None = None,
    gain: Tensor | None = None,
    scaling: Any = 1.0,
) -> bool:
    """`add_low_rank` with factors that are packed now; False too if they cannot be packed."""
    factors = factors_of(a, b, scaling)
    return factors is not None and add_low_rank(y, x, a, b, factors, diagonal, gain)


def values(
    rows: int, inputs: int, r: int, outputs: int, dtype: torch.dtype, factors: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, x, A, B)"""
    torch.manual_seed(rows + inputs + r + outputs)
    y, x = torch.randn(rows, 1, outputs).to(dtype), torch.randn(rows, 1, inputs).to(dtype)
    return y, x, torch.randn(r, inputs).to(factors), torch.randn(outputs, r).to(factors)


@types
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 11])
@pytest.mark.parametrize(
    ("inputs", "r", "outputs"),
    [
        (64, 16, 48),
        (40, 32, 33),
        (17, 64, 20),
        (7, 1, 35),
        (33, 5, 17),
        (16, 8, 16),
        (20, 4, 18),
        (24, 2, 40),
        (100, 3, 2),
        (20, 12, 50),
    ],
)
def test_formula(rows: int, inputs: int, r: int, outputs: int, dtype: torch.dtype, factors: torch.dtype) -> None:
    for diagonal, gain in ((None, None), (torch.randn(r, 1).to(factors), None), (None, torch.randn(outputs))):
        y, x, a, b = values(rows, inputs, r, outputs, dtype, factors)
        scales = torch.ones(r) if diagonal is None else diagonal.view(-1)
        added = 1.5 * ((x.double() @ a.double().T) * scales.double()) @ b.double().T
        exact, size = y.double() + added, added.abs().max()
        if gain is not None:
            exact, size = exact * gain, size * gain.abs().max()
        assert add(y, x, a, b, diagonal, gain, 1.5)
        rounding = 1e-6 * size + (exact.abs() / 256 if dtype == torch.bfloat16 else 1e-6)
        assert ((y.double() - exact).abs() <= rounding).all()


def test_bfloat16_is_rounded_as_by_pytorch() -> None:
    """Halves are rounded to even, and numbers that are none stay so: the sum is x itself, 0 or infinity."""
    given = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -3.4e38, float("nan"), float("inf"), 1e-40, -0.0])
    given = torch.cat([given.repeat(4), given])  # 40 outputs: vectors and single ones
    y, x = torch.zeros(1, 40, dtype=torch.bfloat16), torch.ones(1, 1, dtype=torch.bfloat16)
    assert add(y, x, torch.ones(1, 1), given.view(40, 1))
    expected = (given + 0.0).bfloat16()
    assert torch.equal(y.isnan()[0], expected.isnan())
    assert torch.equal(y[0].nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize(
    "change",
    [
        lambda y, x, a, b: (y.half(), x.half(), a, b),
        lambda y, x, a, b: (y.double(), x.double(), a.double(), b.double()),
        lambda y, x, a, b: (y, x.bfloat16(), a, b),
        lambda y, x, a, b: (y, x, a.bfloat16(), b.bfloat16()),
        lambda y, x, a, b: (y, x, a, b.bfloat16()),
        lambda y, x, a, b: (y, x, a.T.contiguous().T, b),
        lambda y, x, a, b: (y, x, a, b.T.contiguous().T),
        lambda y, x, a, b: (y.T.contiguous().T, x, a, b),
        lambda y, x, a, b: (y, x.T.contiguous().T, a, b),
        lambda y, x, a, b: (y, x, a.to("meta"), b),
        lambda y, x, a, b: (y, x, a.as_subclass(Marked), b),
        lambda y, x, a, b: (y, x.as_subclass(Marked), a, b),
        lambda y, x, a, b: (y, x[:, :-1].contiguous(), a, b),
        lambda y, x, a, b: (y, x[:-1], a, b),
        lambda y, x, a, b: (y, x, a, b[:-1]),
        lambda y, x, a, b: (y, x, a[:-1], b),
    ],
)
def test_what_does_not_fit_is_left_alone(change: Any) -> None:
    y, x, a, b = change(*(one.squeeze(1) for one in values(3, 8, 4, 6, torch.float32)))
    before = y.clone()
    assert not add(y, x, a, b)
    assert torch.equal(y, before)


@pytest.mark.parametrize(
    "change",
    [
        lambda a, b: (a.clone(), b),
        lambda a, b: (a, b.clone()),
        lambda a, b: (a.set_(torch.ones(4, 8)), b),  # type: ignore[func-returns-value]
        lambda a, b: (a, b.set_(torch.ones(6, 4))),
        lambda a, b: (a.resize_(2, 16), b),
        lambda a, b: (a, b.resize_(2, 4)),
        lambda a, b: (a.t_().resize_(4, 8).t_(), b),
        lambda a, b: (setattr(a, "data", a.data.bfloat16()) or a, b),
    ],
)
def test_factors_are_of_tensors_in_the_memory_of_the_time_when_they_were_packed(change: Any) -> None:
    y, x, a, b = values(3, 8, 4, 6, torch.float32)
    factors = factors_of(a, b, 1.0)
    assert factors is not None
    a.mul_(2)
    assert add_low_rank(y, x, a, b, factors, None, None)
    before, (a, b) = y.clone(), change(a, b)
    assert not add_low_rank(y, x, a, b, factors, None, None)
    assert torch.equal(y, before)


@pytest.mark.parametrize(
    "vector", [torch.ones(3), torch.ones(4).half(), torch.ones(8)[::2], torch.ones(4, device="meta")]
)
def test_diagonal_or_gain_that_does_not_fit(vector: Tensor) -> None:
    y, x, a, b = values(1, 8, 4, 4, torch.float32)
    assert not add(y, x, a, b, vector, None)
    assert not add(y, x, a, b, None, vector)


def test_other_scalings_and_much_work_are_pytorchs() -> None:
    y, x, a, b = values(1, 8, 4, 6, torch.float32)
    assert not add(y, x, a, b, scaling=torch.tensor(1.0))
    most = MOST_WORK // (1 if openmp() else torch.get_num_threads()) // (4 * 14)
    for rows, fits in ((most, True), (most + 1, False)):
        outputs, inputs = y.repeat(rows, 1, 1), x.repeat(rows, 1, 1)
        assert add(outputs, inputs, a, b) == fits


ROWS = [1, 0, 0, None, 2, 0, None, 2, 2, 2, 2, 2, 1]
"""Numbers of the rows' adapters: runs of one and of several rows, and rows without one."""


def table_of(factors: list[Tensor], scalings: list[Any], rows: Sequence[int | None] = ROWS) -> RowTable | None:
    """The table for A and B of each adapter; None if an adapter's factors do not fit."""
    found = [factors_of(*each) for each in zip(factors[::2], factors[1::2], scalings, strict=True)]
    if None in found:
        return None
    return row_table([None if n is None else found[n] for n in rows])


def adapters(ranks: tuple[int, ...] = (4, 16, 5), dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """A and B of each adapter."""
    torch.manual_seed(0)
    return [tensor.to(dtype) for r in ranks for tensor in (torch.randn(r, 33), torch.randn(37, r))]


@types
def test_each_row_has_its_own_factors(dtype: torch.dtype, factors: torch.dtype) -> None:
    y, x, *_ = values(len(ROWS), 33, 1, 37, dtype)
    pairs, scalings, given = adapters(dtype=factors), [1.0, 0.5, -2.0], y.clone()
    table = table_of(pairs, scalings)
    assert table is not None
    assert add_low_rank_by_row(y, x, table)
    for row, number in enumerate(ROWS):
        expected = given[row].clone()
        if number is not None:
            a, b = pairs[2 * number : 2 * number + 2]
            assert add(expected, x[row], a, b, scaling=scalings[number])
        tolerance = 1e-5 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(y[row], expected, rtol=tolerance, atol=tolerance)
    assert not add_low_rank_by_row(y[1:], x[1:], table)
    assert not add_low_rank_by_row(y, x[..., 1:].contiguous(), table)
    for other in {torch.float16, torch.bfloat16, torch.float32} - {dtype, factors}:
        fits = factors is torch.float32 and other is torch.bfloat16
        assert add_low_rank_by_row(y.to(other), x.to(other), table) == fits


@types
def test_threads_share_the_rows(dtype: torch.dtype, factors: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The outputs are the same bit by bit with any number of threads, and without PyTorch's OpenMP library."""
    rows = ROWS * 2 + [2] * 40
    y, x, *_ = values(len(rows), 33, 1, 37, dtype)
    table = table_of(adapters(dtype=factors), [1.0, 0.5, -2.0], rows)
    assert table is not None
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for library in (openmp, lambda: None):
                monkeypatch.setattr(compiled_low_rank, "openmp", library)
                found.append(y.clone())
                assert add_low_rank_by_row(found[-1], x, table)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


@types
@pytest.mark.parametrize("rows", [29, 32])
def test_threads_share_the_rows_of_one_adapter(
    rows: int, dtype: torch.dtype, factors: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The outputs are the same bit by bit with any number of threads."""
    y, x, a, b = values(rows, 33, 16, 37, dtype, factors)
    monkeypatch.setattr(compiled_low_rank, "LEAST_SHARED_WORK", 0)
    gain, found, threads = torch.randn(37), [], torch.get_num_threads()
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            found.append(y.clone())
            assert add(found[-1], x, a, b, None, gain, 1.5)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


@types
def test_rows_of_several_tokens(dtype: torch.dtype, factors: torch.dtype) -> None:
    """A row's adapter is that of all its tokens; the outputs are those of as many rows with one token each."""
    tokens, pairs, scalings = 21, adapters(dtype=factors), [1.0, 0.5, -2.0]
    torch.manual_seed(0)
    y, x = torch.randn(len(ROWS), tokens, 37).to(dtype), torch.randn(len(ROWS), tokens, 33).to(dtype)
    found, expected = y.clone(), y.clone()
    table, by_token = table_of(pairs, scalings), table_of(pairs, scalings, [n for n in ROWS for _ in range(tokens)])
    assert table is not None and by_token is not None
    assert add_low_rank_by_row(found, x, table) and add_low_rank_by_row(expected.view(-1, 37), x.view(-1, 33), by_token)
    assert torch.equal(found, expected) and not torch.equal(found, y)
    assert not add_low_rank_by_row(found.view(-1, 37)[1:], x.view(-1, 33)[1:], table)


def test_adapters_may_share_a_factor() -> None:
    """Consecutive rows are computed together only if A, B and s are the same."""
    a, b, other = torch.randn(4, 33), torch.randn(37, 4), torch.randn(37, 4)
    y, x, *_ = values(4, 33, 1, 37, torch.float32)
    table, expected = table_of([a, b, a, other, a, b], [1.0, 1.0, 2.0], [0, 1, 2, 0]), y.clone()
    assert table is not None and add_low_rank_by_row(y, x, table)
    for row, (factor, scaling) in enumerate([(b, 1.0), (other, 1.0), (b, 2.0), (b, 1.0)]):
        assert add(expected[row], x[row], a, factor, scaling=scaling)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_much_work_of_mixed_rows_is_pytorchs() -> None:
    table = table_of(adapters((4,)), [1.0], [0, 0])
    assert table is not None
    most = (MOST_WORK_BY_ROW if openmp() else MOST_WORK // torch.get_num_threads()) // (2 * 4 * (33 + 37))
    for tokens, fits in ((most, True), (most + 1, False)):
        assert add_low_rank_by_row(torch.zeros(2, tokens, 37), torch.zeros(2, tokens, 33), table) == fits


def test_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_low_rank, "compiled", lambda: lambda *_: 0)
    y, x, a, b = values(len(ROWS), 33, 4, 37, torch.float32)
    table = table_of(adapters(), [1.0, 0.5, -2.0])
    assert table is not None
    with pytest.raises(MemoryError, match="product of 13 rows"):
        add(y, x, a, b)
    with pytest.raises(MemoryError, match="product of 13 rows"):
        add_low_rank_by_row(y, x, table)


@pytest.mark.skipif(not openmp(), reason="this PyTorch has no GNU OpenMP library")
def test_rows_are_computed_in_pytorchs_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """`GOMP_parallel` gets the function, its data, and the number of threads that PyTorch uses."""
    calls: list[int] = []

    @ctypes.CFUNCTYPE(None, ctypes.CFUNCTYPE(None, ctypes.c_void_p), ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    def parallel(function: Any, data: Any, count: int, _flags: int) -> None:
        calls.append(count)
        function(data)

    monkeypatch.setattr(compiled_low_rank, "openmp", lambda: ctypes.cast(parallel, ctypes.c_void_p).value)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    y, x, *_ = values(len(ROWS), 33, 1, 37, torch.float32)
    table = table_of(adapters(), [1.0, 0.5, -2.0])
    assert table is not None and add_low_rank_by_row(y, x, table)
    assert calls == [3]
    for rows, expected in ((8, [3]), (16, [3, 3])):  # few rows of one adapter are computed in one thread
        y, x, a, b = values(rows, 576, 16, 576, torch.float32)
        assert add(y, x, a, b)
        assert calls == expected


def test_table_reads_the_values_of_each_call_from_memory_that_it_keeps() -> None:
    y, x, *_ = values(len(ROWS), 33, 1, 37, torch.float32)
    factors = adapters()
    table = table_of(factors, [1.0] * 3)
    before, after, gone = y.clone(), y.clone(), y.clone()
    assert table is not None and add_low_rank_by_row(before, x, table)
    for a in factors[::2]:
        a.mul_(2)
    assert add_low_rank_by_row(after, x, table)
    torch.testing.assert_close(after - y, 2 * (before - y), rtol=1e-4, atol=1e-4)
    del factors, a
    adapters()  # would lie in the factors' memory
    assert add_low_rank_by_row(gone, x, table) and torch.equal(gone, after)


@pytest.mark.parametrize(
    "change",
    [
        lambda a, b: (a.half(), b),
        lambda a, b: (a, b.T.contiguous().T),
        lambda a, b: (a, b.to("meta")),
        lambda a, b: (a.as_subclass(Marked), b),
        lambda a, b: (a[:, 1:].contiguous(), b),
        lambda a, b: (a, b[1:]),
        lambda a, b: (a[1:], b),
    ],
)
def test_no_table_for_factors_that_do_not_fit(change: Any) -> None:
    *first, a, b = adapters()
    assert table_of([*first, *change(a, b)], [1.0] * 3) is None
    assert table_of([*first, a, b], [1.0, 1.0, torch.tensor(1.0)]) is None


@torch.no_grad()
def test_modes_that_count_operations_see_them_all() -> None:
    model: Any = get_peft_model(nn.Sequential(nn.Linear(8, 6)), LoraConfig(r=4, target_modules=["0"])).eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.ones(1, 8))
    assert counter.get_total_flops() == 2 * (8 * 6 + 8 * 4 + 4 * 6)


@types
@pytest.mark.parametrize("kind", ["lora", "dora", "adalora"])
@torch.no_grad()
def test_layers_use_it(dtype: torch.dtype, factors: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    common: dict[str, Any] = {"target_modules": ["0"], "init_lora_weights": False}
    config: Any = LoraConfig(r=4, use_dora=kind == "dora", **common)
    if kind == "adalora":
        config = AdaLoraConfig(init_r=4, target_r=2, total_step=10, **common)
    layer = nn.Linear(24, 20, bias=False, dtype=dtype)
    model: Any = get_peft_model(nn.Sequential(layer), config, autocast_adapter_dtype=factors is torch.float32).eval()
    x, calls = torch.randn(3, 24, dtype=dtype), []
    function: Any = compiled()
    monkeypatch.setattr(compiled_low_rank, "compiled", lambda: lambda *given: calls.append(given) or function(*given))
    y = model(x)
    assert len(calls) == 1
    monkeypatch.setattr(compiled_low_rank, "compiled", lambda: None)
    expected = model(x)  # PyTorch rounds each product to the factors' type
    rounding = 1e-5 if factors == torch.float32 else 2**-6 * expected.abs().max().item()
    torch.testing.assert_close(y, expected, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=rounding)
