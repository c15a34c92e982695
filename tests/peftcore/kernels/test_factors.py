"""Operations on factors equal dense linear algebra."""

import pytest
import torch
from torch import Tensor

from peftcore.kernels.factors import Factors, LowRankReport, inner, padded, stacked, svd_of_dense, svd_of_factors

SIZES = [(1, 30, 20, 6), (1, 20, 30, 6), (1, 8, 12, 20), (3, 9, 14, 5), (1, 5, 40, 5)]
"""Experts, outputs, inputs, rank."""


def random_factors(e: int, o: int, i: int, r: int, scaling: float = 0.7) -> Factors:
    torch.manual_seed(e + o + i + r)
    return Factors(torch.randn(e, r, i).double(), torch.randn(e, o, r).double(), scaling)


def best(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation by PyTorch's SVD of the whole matrix, and the squared singular values it leaves out."""
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :], s[..., rank:].square().sum()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_svd_on_factors_is_the_svd_of_the_dense_change(size: tuple[int, int, int, int], rank: int) -> None:
    change = random_factors(*size)
    expected, lost = best(change.dense(), rank)
    for svd in (svd_of_factors(change, rank), svd_of_dense(change.dense(), rank)):
        scale = change.dense().abs().max()
        assert (svd.factors().dense() - expected).abs().max() < 1e-10 * scale
        assert float(svd.lost) == pytest.approx(float(lost), rel=1e-10, abs=1e-10)
        assert float(svd.total) == pytest.approx(float(change.dense().square().sum()), rel=1e-12)
        assert svd.factors().rank == rank
        assert torch.allclose(svd.balanced().dense(), svd.factors().dense())
        rows = svd.factors().a @ svd.factors().a.mT
        assert torch.allclose(rows, torch.eye(rank).double().expand_as(rows), atol=1e-10)


@pytest.mark.parametrize("wide", [False, True])
def test_a_dense_change_of_lower_rank_than_asked_for(wide: bool) -> None:
    change = random_factors(1, 12, 20, 2) if wide else random_factors(1, 20, 12, 2)
    svd = svd_of_dense(change.dense(), 6)
    assert torch.allclose(svd.factors().dense(), change.dense(), atol=1e-10) and float(svd.lost) < 1e-10
    nothing = svd_of_dense(torch.zeros(1, 6, 5), 3)
    assert not nothing.factors().dense().any() and float(nothing.total) == 0


def test_inner_products_stacks_and_padding() -> None:
    one, other = random_factors(2, 9, 14, 5), random_factors(2, 9, 14, 3, -1.5)
    assert float(inner(one, other)) == pytest.approx(float((one.dense() * other.dense()).sum()), rel=1e-12)
    assert torch.allclose(stacked([one, other], [2.0, -0.3]).dense(), 2 * one.dense() - 0.3 * other.dense())
    wider = padded(one, 8)
    assert wider.rank == 8 and torch.equal(wider.dense(), one.dense())


def test_a_function_chooses_the_rank_from_all_singular_values() -> None:
    change = random_factors(1, 12, 20, 6)
    expected = torch.linalg.svdvals(change.dense())[0, :6]

    def choose(s: Tensor) -> int:
        torch.testing.assert_close(s[0, :6], expected, atol=1e-6, rtol=1e-9)
        return 2

    for svd in (svd_of_factors(change, choose), svd_of_dense(change.dense(), choose)):
        torch.testing.assert_close(svd.s[0], expected[:2])


def test_a_dense_change_that_is_not_finite_is_refused() -> None:
    with pytest.raises(torch.linalg.LinAlgError, match="not finite"):
        svd_of_dense(torch.full((1, 3, 4), torch.nan), 2)


def test_a_report_weighs_layers_by_their_norm() -> None:
    report = LowRankReport.of({"a": 1, "b": 2, "c": 0}, {"a": (9.0, 25.0), "b": (0.0, 11.0), "c": (0.0, 0.0)})
    assert report.errors == {"a": 0.6, "b": 0.0, "c": 0.0} and report.error == 0.5


def test_without_scipy_all_eigenvectors_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    change = torch.randn(2, 12, 9).double()
    one = svd_of_dense(change, 3)
    monkeypatch.setattr("peftcore.kernels.factors.find_spec", lambda _name: None)
    other = svd_of_dense(change, 3)
    torch.testing.assert_close(other.factors().dense(), one.factors().dense())
    torch.testing.assert_close(other.lost, one.lost)
