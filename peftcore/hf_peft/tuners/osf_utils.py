"""`peft.tuners.osf.utils`: OSF's decomposition of a weight, for scripts that use it by itself.

peftcore's layers of OSF do not call these functions. Their equations are in `peftcore.methods.osf`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.hf_peft.reexports import reexported

__all__ = ["decompose_weight_matrix", "project_gradient_to_orthogonal_space", "reconstruct_weight_matrix"]


@torch.no_grad()
def decompose_weight_matrix(weight: Tensor, top_k: int) -> dict[str, Any]:
    """Return a weight's singular value decomposition, in a kept and a trainable part.

    Args:
        weight: a matrix (o, i), with m = min(o, i) singular values.
        top_k: number of singular values to keep; all if it is larger than m.

    Returns:
        The tensors "U_high" (o, k), "S_high" (k,) and "V_high" (k, i), the parameters "U_low" (o, m − k),
        "S_low" (m − k,) and "V_low" (m − k, i), all of the weight's dtype, and the number k as "rank_high".
    """
    factors = torch.linalg.svd(weight.float(), full_matrices=False)
    k = min(top_k, len(factors.S))
    high = {"U_high": factors.U[:, :k], "S_high": factors.S[:k], "V_high": factors.Vh[:k]}
    low = {"U_low": factors.U[:, k:], "S_low": factors.S[k:], "V_low": factors.Vh[k:]}
    kept = {name: part.to(weight.dtype, memory_format=torch.contiguous_format) for name, part in high.items()}
    trained = {name: part.to(weight.dtype, memory_format=torch.contiguous_format) for name, part in low.items()}
    return {**kept, **{name: nn.Parameter(part) for name, part in trained.items()}, "rank_high": k}


def reconstruct_weight_matrix(svd_dict: Mapping[str, Tensor]) -> Tensor:
    """Return the weight (o, i) of a decomposition, with gradients to its trainable part."""
    high = (svd_dict["U_high"] * svd_dict["S_high"]) @ svd_dict["V_high"]
    return high + (svd_dict["U_low"] * svd_dict["S_low"]) @ svd_dict["V_low"]


@torch.no_grad()
def project_gradient_to_orthogonal_space(svd_dict: Mapping[str, Any]) -> None:
    """Make the gradients of "U_low" and "V_low" orthogonal to the kept part, in place; a missing gradient is left out.

    Args:
        svd_dict: a decomposition by `decompose_weight_matrix`.
    """
    u, v = svd_dict["U_high"], svd_dict["V_high"]
    if (gradient := svd_dict["U_low"].grad) is not None:
        gradient.sub_(u @ (u.mT @ gradient))
    if (gradient := svd_dict["V_low"].grad) is not None:
        gradient.sub_((gradient @ v.mT) @ v)


def __getattr__(name: str) -> Any:
    return reexported(__name__, name)
