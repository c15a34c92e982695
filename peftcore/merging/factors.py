"""Low-rank changes of weights by their factors, without ever forming ΔW = s·BA.

⟨Δ₁, Δ₂⟩ = s₁s₂ tr((A₂A₁ᵀ)(B₁ᵀB₂)), and a sum of changes has the factors stacked. Its SVD is that of a small core:
with B = Q_b R_b and Aᵀ = Q_a R_a, the SVD R_b R_aᵀ = U S Vᵀ gives BA = (Q_b U) S (Q_a V)ᵀ.

Shapes: e experts (1 for every other layer), o out_features, i in_features times kernel, r rank.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from peftcore.kernels.low_rank import Factors


class Reduced(NamedTuple):
    """The best approximation of a change that has a rank."""

    factors: Factors
    """The rows of A are orthonormal, B holds the singular values."""
    lost: Tensor
    """‖ΔW − BA‖², squared Frobenius norm."""
    total: Tensor
    """‖ΔW‖²."""


def inner(one: Factors, other: Factors) -> Tensor:
    """⟨Δ₁, Δ₂⟩, the sum of the products of their elements."""
    return one.scaling * other.scaling * ((other.a @ one.a.mT) * (other.b.mT @ one.b)).sum()


def stacked(changes: Sequence[Factors], coefficients: Sequence[float]) -> Factors:
    """Σ cᵢΔᵢ exactly, of the sum of their ranks."""
    a = torch.cat([change.a for change in changes], 1)
    return Factors(
        a, torch.cat([change.b * (change.scaling * c) for change, c in zip(changes, coefficients, strict=True)], 2)
    )


def reduced(change: Factors, rank: int) -> Reduced:
    """To a rank, by two QR decompositions and the SVD of what is left."""
    q_b, r_b = torch.linalg.qr(change.b)
    q_a, r_a = torch.linalg.qr(change.a.mT)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT * change.scaling, full_matrices=False)
    b = q_b @ (u * s.unsqueeze(-2))[..., :rank]
    square = s.square()
    return Reduced(Factors(vh[..., :rank, :] @ q_a.mT, b), square[..., rank:].sum(), square.sum())


def reduced_dense(change: Tensor, rank: int) -> Reduced:
    """A dense ΔW (e, o, i) to a rank: projected on the leading eigenvectors of ΔΔᵀ or ΔᵀΔ, whichever is smaller."""
    tall = change.shape[1] > change.shape[2]
    wide = change.mT if tall else change
    exact = wide.double()  # because a Gram matrix squares what is small
    total = exact.square().sum()
    if not total.isfinite():
        raise torch.linalg.LinAlgError("ΔW is not finite")  # pyright: ignore[reportPrivateImportUsage]
    values, vectors = _leading(exact @ exact.mT, rank)
    lost = (total - values.clamp_min(0).sum()).clamp_min(0)
    basis = vectors.to(change)
    along = basis.mT @ wide
    if tall:
        return Reduced(Factors(basis.mT, along.mT), lost, total)
    lengths = along.norm(dim=-1, keepdim=True)
    a = along / torch.where(lengths > 0, lengths, 1)
    return Reduced(Factors(a, basis * lengths.mT), lost, total)


def _leading(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues (e, r) and their eigenvectors (e, n, r) of (e, n, n), the largest first."""
    size = gram.shape[-1]
    # LAPACK finds some of the vectors in a third of the time of all, but PyTorch has no name for it; SciPy is optional
    if gram.is_cpu and find_spec("scipy") is not None:
        from scipy.linalg import eigh

        found = [eigh(one.numpy(), subset_by_index=(size - rank, size - 1)) for one in gram]
        values, vectors = (torch.stack([torch.from_numpy(pair[i]) for pair in found]) for i in (0, 1))
    else:
        values, vectors = torch.linalg.eigh(gram)
    return values[..., -rank:].flip(-1), vectors[..., -rank:].flip(-1)


def padded(change: Factors, rank: int) -> Factors:
    """The same change with factors of a larger rank."""
    more = rank - change.rank
    if not more:
        return change
    pad = torch.nn.functional.pad
    return change._replace(a=pad(change.a, (0, 0, 0, more)), b=pad(change.b, (0, more)))
