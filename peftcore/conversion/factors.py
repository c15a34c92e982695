"""Two factors of a weight's change, and the best ones of a smaller rank.

The best rank-r approximation of Δ in Frobenius norm is U_r U_rᵀ Δ, U_r the first r left singular vectors, and it
misses (Σ_{j>r} σ_j²)^½ (Eckart and Young, 1936). U comes from the eigenvectors of ΔΔᵀ in float64, several times
faster than a singular value decomposition and good to 1e-8 of σ₁. Of factors, Δ itself is never formed: with QR of
both, the core R_B R_Aᵀ has Δ's singular values.

Shapes: o out_features, i in_features (times the kernel's size for a convolution), r rank.
"""

from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST = 1e-7
"""Singular values below this share of the largest are rounding."""


class Factors(NamedTuple):
    """Δ = s·BA."""

    a: Tensor
    """A (r, i)."""
    b: Tensor
    """B (o, r)."""
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        return len(self.a)

    def norm(self) -> float:
        """‖s·BA‖, Frobenius, without forming BA."""
        a, b = self.a.double(), self.b.double()
        return abs(self.scaling) * float(((a @ a.T) * (b.T @ b)).sum().clamp_min(0).sqrt())


class Shortened(NamedTuple):
    """Factors in place of a change."""

    factors: Factors
    norm: float
    """‖Δ‖, Frobenius."""
    missing: float
    """‖Δ − s·BA‖."""


def shortened(factors: Factors, rank: int | None, tolerance: float | None) -> Shortened:
    """Factors of at most `rank`, or of the least rank whose relative error is at most `tolerance`.

    Those that are short enough already are given back as they are.
    """
    size = factors.norm()
    if tolerance is None and (rank is None or factors.rank <= rank):
        return Shortened(factors, size, 0.0)
    qb, rb = torch.linalg.qr(factors.b.double())
    qa, ra = torch.linalg.qr(factors.a.double().T)
    u, sigma, vh = torch.linalg.svd(rb @ ra.T * factors.scaling)
    kept = _kept(sigma, rank, tolerance)
    if kept == factors.rank:
        return Shortened(factors, size, 0.0)
    root = sigma[:kept].sqrt()
    found = Factors(_as((qa @ vh[:kept].T).T * root[:, None], factors.a), _as(qb @ u[:, :kept] * root, factors.b))
    return Shortened(found, size, float(sigma[kept:].norm()))


def factorised(delta: Tensor, rank: int | None, tolerance: float | None) -> Shortened:
    """Factors (float32) of Δ (o, i), given in float64; both balanced, each with the root of the singular values."""
    wide = delta.shape[0] > delta.shape[1]
    square = delta.T @ delta if wide else delta @ delta.T
    eigenvalues, vectors = torch.linalg.eigh(square)
    sigma, vectors = eigenvalues.flip(0).clamp_min(0).sqrt(), vectors.flip(1)
    kept = _kept(sigma, rank, tolerance)
    vectors, root = vectors[:, :kept], sigma[:kept].sqrt()
    one = vectors * root
    other = (delta @ vectors if wide else delta.T @ vectors) / root
    a, b = (one.T, other) if wide else (other.T, one)
    found = Factors(a.float().contiguous(), b.float().contiguous())
    return Shortened(found, float(delta.norm()), float((delta - found.b.double() @ found.a.double()).norm()))


def _kept(sigma: Tensor, rank: int | None, tolerance: float | None) -> int:
    """How many singular values to keep, those that are rounding never."""
    significant = int((sigma > SMALLEST * sigma[0]).sum()) if len(sigma) else 0
    if tolerance is not None:
        missing = sigma.square().flip(0).cumsum(0).flip(0).sqrt()  # without those from here on
        needed = int((missing > tolerance * missing[0]).sum()) if len(sigma) else 0
        significant = min(significant, needed)
    return significant if rank is None else min(significant, rank)


def _as(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.dtype).contiguous()
