"""Low-rank weight changes ΔW = s·BA: their algebra, and the best approximation of a change by a smaller rank.

The best approximation of rank k in Frobenius norm is the singular value decomposition, cut after k singular values.
Its squared error is the sum of the squares of the others (Eckart and Young, 1936, doi:10.1007/BF02288367).

Shapes: e experts (1 for every layer that is no expert), o out_features, i in_features times kernel size, r rank of a
change, k rank of its approximation.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Factors(NamedTuple):
    """A weight change ΔW = s·BA, read from an adapter's parameters.

    `Factors` describe a fixed change of a weight, for merging, conversion and export. A `LowRankBranch` describes one
    forward pass: it has dropout and a gain too.
    """

    a: Tensor
    """A (e, r, i)."""
    b: Tensor
    """B (e, o, r)."""
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        """Rank r (count)."""
        return self.a.shape[1]

    def dense(self) -> Tensor:
        """Return ΔW (e, o, i)."""
        return self.scaling * self.b @ self.a


class TruncatedSvd(NamedTuple):
    """The k largest singular values of a change with their singular vectors: ΔW ≈ U diag(S) Vᵀ."""

    u: Tensor
    """U (e, o, k), orthonormal columns."""
    s: Tensor
    """S (e, k), the largest first."""
    vh: Tensor
    """Vᵀ (e, k, i), orthonormal rows."""
    lost: Tensor
    """Squared Frobenius norm of the discarded part of ΔW."""
    total: Tensor
    """Squared Frobenius norm of ΔW."""

    def factors(self) -> Factors:
        """Return B = U diag(S) and A = Vᵀ, as HF PEFT splits an SVD."""
        return Factors(self.vh, self.u * self.s.unsqueeze(-2))

    def balanced(self) -> Factors:
        """Return B = U diag(√S) and A = diag(√S) Vᵀ, so that both factors have the same norm."""
        root = self.s.sqrt()
        return Factors(root.unsqueeze(-1) * self.vh, self.u * root.unsqueeze(-2))


Count = int | Callable[[Tensor], int]
"""Singular values to keep (count), or a function of all singular values (e, n), the largest first, that returns it."""


@dataclass(frozen=True)
class LowRankReport:
    """Ranks and errors of a LoRA that was computed from other adapters, by merging or by conversion.

    An error is ‖ΔW − s·BA‖ / ‖ΔW‖ in Frobenius norm, and 0 for an exact result.
    """

    ranks: Mapping[str, int]
    """Rank (count) by path of the layer; a conversion leaves layers of rank 0 out of the LoRA."""
    errors: Mapping[str, float]
    """Error by path of the layer."""
    error: float
    """Error of all layers together."""

    @classmethod
    def of(cls, ranks: Mapping[str, int], squares: Mapping[str, tuple[float, float]]) -> "LowRankReport":
        """Compute the report from ranks and {path: squared norms of (what is cut off, ΔW)}."""
        lost, total = (sum(square[n] for square in squares.values()) for n in (0, 1))
        errors = {path: _share(*square) for path, square in squares.items()}
        return cls(ranks, errors, _share(lost, total))


def _share(lost: float, total: float) -> float:
    return math.sqrt(lost / total) if total > 0 else 0.0


def inner(one: Factors, other: Factors) -> Tensor:
    """Return ⟨Δ₁, Δ₂⟩ = s₁s₂ tr((A₂A₁ᵀ)(B₁ᵀB₂)), the sum of the element-wise products, without forming a ΔW."""
    return one.scaling * other.scaling * ((other.a @ one.a.mT) * (other.b.mT @ one.b)).sum()


def stacked(changes: Sequence[Factors], coefficients: Sequence[float]) -> Factors:
    """Return Σ cᵢΔᵢ exactly, by stacking the factors; the rank is the sum of the ranks."""
    a = torch.cat([change.a for change in changes], 1)
    scaled = [change.b * (change.scaling * c) for change, c in zip(changes, coefficients, strict=True)]
    return Factors(a, torch.cat(scaled, 2))


def padded(change: Factors, rank: int) -> Factors:
    """Return the same change with factors of a larger rank, by rows of zeros in A and columns of zeros in B."""
    missing = rank - change.rank
    if not missing:
        return change
    return change._replace(a=pad(change.a, (0, 0, 0, missing)), b=pad(change.b, (0, missing)))


def svd_of_factors(change: Factors, count: Count) -> TruncatedSvd:
    """Return the truncated SVD of s·BA, without forming BA, in the type of the factors.

    With B = Q_b R_b and Aᵀ = Q_a R_a, the SVD of the small core s·R_b R_aᵀ = U S Vᵀ gives s·BA = (Q_b U) S (Q_a V)ᵀ.
    """
    q_b, r_b = torch.linalg.qr(change.b)
    q_a, r_a = torch.linalg.qr(change.a.mT)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT * change.scaling, full_matrices=False)
    k = count if isinstance(count, int) else count(s)
    square = s.square()
    return TruncatedSvd(q_b @ u[..., :k], s[..., :k], vh[..., :k, :] @ q_a.mT, square[..., k:].sum(), square.sum())


def svd_of_dense(change: Tensor, count: Count) -> TruncatedSvd:
    """Return the truncated SVD of a dense ΔW (e, o, i), in the type of ΔW.

    The leading eigenvectors of ΔWΔWᵀ or ΔWᵀΔW, whichever is smaller, are one side; the other side is ΔW's projection
    onto them. This is several times faster than an SVD. Singular values below 1e-8 of the largest are rounding errors.

    Raises:
        torch.linalg.LinAlgError: ΔW holds NaN or infinite values.
    """
    tall = change.shape[1] > change.shape[2]
    wide = change.mT if tall else change
    exact = wide.double()  # a Gram matrix squares the singular values, so that float32 would lose the small ones
    total = exact.square().sum()
    if not total.isfinite():
        raise torch.linalg.LinAlgError("ΔW is not finite")  # pyright: ignore[reportPrivateImportUsage]
    most = count if isinstance(count, int) else exact.shape[1]
    values, vectors = _leading_eigenvectors(exact @ exact.mT, most)
    values = values.clamp_min(0)
    k = count if isinstance(count, int) else count(values.sqrt())
    basis = vectors[..., :k].to(change)
    projected = basis.mT @ wide
    s = projected.norm(dim=-1)
    others = projected / torch.where(s > 0, s, 1).unsqueeze(-1)
    lost = (total - values[..., :k].sum()).clamp_min(0)
    u, vh = (others.mT, basis.mT) if tall else (basis, others)
    return TruncatedSvd(u, s, vh, lost, total)


def _leading_eigenvectors(gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalues (e, k) of symmetric (e, n, n) and their eigenvectors (e, n, k), largest first."""
    size = gram.shape[-1]
    # LAPACK computes a few eigenvectors in a third of the time of all; of the two, only SciPy gives access to that
    if gram.is_cpu and count < size and find_spec("scipy") is not None:
        from scipy.linalg import eigh

        pairs = [eigh(one.numpy(), subset_by_index=(size - count, size - 1)) for one in gram]
        values, vectors = (torch.stack([torch.from_numpy(pair[n]) for pair in pairs]) for n in (0, 1))
    else:
        values, vectors = torch.linalg.eigh(gram)
    return values[..., -count:].flip(-1), vectors[..., -count:].flip(-1)
