"""HRA: y = W H₁H₂⋯H_r x + b, Hⱼ = I − 2uⱼuⱼᵀ Householder reflections, ‖uⱼ‖ = 1. arXiv:2405.17484.

Shapes: i in_features, k kernel, r rank; hra_u (i·k, r), its columns uⱼ of any length. The product is computed as
I − UTUᵀ with a triangular T (r, r), so the forward costs what LoRA's does. With `apply_GS` the uⱼ are made orthogonal:
I − 2QQᵀ, Q from QR. That is never the identity, so there, unlike PEFT, the uⱼ start independent (pairs give NaN).
"""

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight
from peftcore.config import TunerConfig
from peftcore.errors import ConfigError
from peftcore.kernels.maths import weight_shape, widened
from peftcore.kernels.start_values import kaiming_uniform_
from peftcore.registry import register


@dataclass
class HRAConfig(TunerConfig):
    """HRA's options under PEFT's names."""

    r: int = 8
    """Reflections (count); must be even for the adapter to start at the base's function."""
    apply_GS: bool = False
    """Orthogonalise the reflections' directions (Gram-Schmidt)."""
    bias: str = "none"
    """Biases of the model that train too: "none", "all" or "hra_only"."""
    init_weights: bool = True
    """True: equal pairs of directions, which cancel; False: random, for tests."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r")
        self.one_of("bias", self.bias, ("none", "all", "hra_only"))


@register("HRA", HRAConfig)
class HRA(Adapter):
    """HRA at one layer."""

    layer_kinds = frozenset({"linear", "conv"})

    def __init__(self, config: HRAConfig, base: BaseWeight, path: str):
        super().__init__(config, base, path)
        self.weight_space_forward = base.kind == "conv"
        self.orthogonal = config.apply_GS
        self.starts_at_base = config.init_weights
        features = math.prod(weight_shape(base)[1:])
        if self.orthogonal and config.r > features:
            raise ConfigError(
                f"HRA: apply_GS needs r up to the {features} features of {path}, got {config.r}; try {features}"
            )
        self.hra_u = nn.Parameter(torch.empty(features, config.r))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        rows, r = self.hra_u.shape
        if not self.starts_at_base or self.orthogonal or r % 2:
            kaiming_uniform_(self.hra_u)
        else:
            self.hra_u.copy_(kaiming_uniform_(torch.empty(rows, r // 2, device="cpu")).repeat_interleave(2, 1))
        if self.starts_at_base and not self.orthogonal and r % 2:
            warnings.warn(
                f"The symmetric initialization can NOT be performed when r is odd: an odd number of HRA's reflections "
                f"never cancels; got r={r}, try {r + 1}",
                stacklevel=2,
            )

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return (L, U), both (i·k, r), with H₁⋯H_r = I − L Uᵀ, in float32 or float64 even under autocast."""
        with torch.autocast(self.hra_u.device.type, enabled=False):
            vectors = widened(self.hra_u)
            if self.orthogonal:
                q = torch.linalg.qr(vectors).Q
                return 2 * q, q
            u = vectors / vectors.norm(dim=0)
            inner = torch.triu(u.T @ u, 1) + torch.eye(u.shape[1], dtype=u.dtype, device=u.device) / 2
            return _by_pairs(torch.linalg.solve_triangular(inner, u, upper=True, left=False), u)

    def before(self, x: Tensor) -> Tensor:
        left, u = (factor.to(x.dtype) for factor in self.factors())
        return x - (x @ u) @ left.T

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y

    def merged_weight(self, weight: Tensor) -> Tensor:
        left, u = (factor.to(weight) for factor in self.factors())
        flat = weight.flatten(1)
        return (flat - (flat @ left) @ u.T).view(weight.shape)


def _by_pairs(left: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return two factors with the same product that are small where the reflections of a pair nearly cancel.

    l₁u₁ᵀ + l₂u₂ᵀ = (l₁ + l₂)u₁ᵀ + l₂(u₂ − u₁)ᵀ: in 16 bits the sum and the difference keep what l and u would lose.
    """
    even = u.shape[1] // 2 * 2
    sums = left[:, 0:even:2] + left[:, 1:even:2]
    differences = u[:, 1:even:2] - u[:, 0:even:2]
    lefts = torch.cat([sums, left[:, 1:even:2], left[:, even:]], 1)
    return lefts, torch.cat([u[:, 0:even:2], differences, u[:, even:]], 1)
