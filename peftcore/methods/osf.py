"""OSF: W' = U_h S_h V_h + U S V, where the k largest singular directions U_h, V_h of W are kept. arXiv:2504.07097.

The other directions train. They start at W's own, U₀ S₀ V₀, so ΔW = U S V − U₀ S₀ V₀, and gradients of U and V are
projected to be orthogonal to U_h and V_h. U₀, S₀ and V₀ are not saved: W's decomposition gives them again.

Shapes: i in_features, o out_features, m = min(i, o), k effective rank, n = m − k; U (o, n), S (n,), V (n, i),
U_h (o, k), V_h (k, i).
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftcore._util.patterns import matched
from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight
from peftcore.config import ALL_LINEAR, TunerConfig
from peftcore.detection import detect
from peftcore.detection.roles import ATTENTION
from peftcore.errors import ConfigError
from peftcore.kernels.factors import Factors
from peftcore.registry import register


@dataclass
class OSFConfig(TunerConfig):
    """OSF's options under PEFT's names."""

    not_saved_if_none: ClassVar[tuple[str, ...]] = ("exclude_modules", "layers_pattern", "layers_to_transform")
    size_fields: ClassVar[tuple[str, ...]] = ()

    effective_rank: int | float | None = None
    """k, the singular directions to keep (count), at most all; a float in (0, 1] is a share of m; None: half of m."""
    rank_pattern: dict[str, int | float] | None = None
    """{regular expression: effective_rank}; the first that is found anywhere in a layer's path applies."""
    init_weights: bool | None = True
    """False: U, S and V start at random, for tests; otherwise the adapter starts at its base."""
    target_svd_config: dict[str, int] | None = None
    """Accepted for PEFT, where it has no effect either; a value is a warning."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, rank in {"effective_rank": self.effective_rank, **(self.rank_pattern or {})}.items():
            if rank is not None and (isinstance(rank, bool) or not rank > 0):
                raise ConfigError(f"OSFConfig: {name} must be a positive number; got {rank!r}; try 8, or 0.5 for half")
        if self.target_svd_config:
            message = "OSFConfig: target_svd_config has no effect, as in HF PEFT; give rank_pattern for single layers"
            warnings.warn(message, stacklevel=3)

    def rank_at(self, path: str, size: int) -> int:
        """Return k (count) for the layer `path`, whose smaller dimension is `size`."""
        patterns = (rank for key, rank in (self.rank_pattern or {}).items() if matched(key, path, ".*", ".*"))
        rank = next(patterns, self.effective_rank)
        if rank is None:
            return size // 2
        return min(size, int(size * rank) if isinstance(rank, float) and rank <= 1 else int(rank))


class _Projected(torch.autograd.Function):
    """A matrix (d, n) itself, with the gradient G projected: Q Qᵀ G, or G − Q Qᵀ G for the complement of Q (d, q)."""

    @staticmethod
    def forward(matrix: Tensor, basis: Tensor, complement: bool) -> Tensor:
        return matrix.view_as(matrix)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.complement = inputs[2]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (basis,), (gradient,) = ctx.saved_tensors, gradients
        inside = basis @ (basis.mT @ gradient)
        return gradient - inside if ctx.complement else inside, None, None


@register("OSF", OSFConfig)
class Osf(Adapter):
    """OSF at one layer."""

    start_U: Tensor
    start_S: Tensor
    start_V: Tensor
    kept: Tensor
    """The kept directions on the longer side of W, U_h or V_hᵀ. On the other side, U₀ or V₀ᵀ spans their complement."""

    def __init__(self, config: OSFConfig, base: BaseWeight, path: str):
        super().__init__(config, base, path)
        o, i = base.out_features, base.in_features
        self.effective_rank = k = config.rank_at(path, min(o, i))
        if not k:
            raise ConfigError(
                f"OSF: effective_rank keeps none of the {min(o, i)} singular directions of {path}; give a larger one"
            )
        if not (n := min(o, i) - k):
            warnings.warn(
                f"OSF: effective_rank={k} keeps all directions of {path}, so nothing trains there", stacklevel=2
            )
        self.init = config.init_weights
        self.osf_U_low = nn.Parameter(torch.empty(o, n))
        self.osf_S_low = nn.Parameter(torch.empty(n))
        self.osf_V_low = nn.Parameter(torch.empty(n, i))
        for name in "USV":
            self.register_buffer(f"start_{name}", torch.empty_like(self.get_parameter(f"osf_{name}_low")))
        self.register_buffer("kept", torch.empty(max(o, i), 0 if o == i else k))

    @classmethod
    def default_targets(cls, config: OSFConfig, model: nn.Module, layers: Mapping[str, nn.Module]) -> str | None:
        return None if detect(model).targets(*ATTENTION) else ALL_LINEAR

    @torch.no_grad()
    def reset_parameters(self) -> None:
        u, s, v = torch.linalg.svd(self.base.read_unmerged().to(torch.float32), full_matrices=False)
        k = self.effective_rank
        for name, values in {"U": u[:, k:], "S": s[k:], "V": v[k:]}.items():
            self.get_buffer(f"start_{name}").copy_(values)
            parameter = self.get_parameter(f"osf_{name}_low")
            if self.init is False:  # PEFT draws in the weight's type and place
                values = torch.randn(values.shape, dtype=self.base.dtype, device=parameter.device)
            parameter.copy_(values)
        if self.kept.numel():
            self.kept.copy_(u[:, :k] if len(u) > v.shape[1] else v[:k].mT)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Return (2n, i) and (o, 2n), whose product is ΔW = (US − U₀S₀) V + U₀S₀ (V − V₀), exactly 0 at the start."""
        u, v = self.osf_U_low, self.osf_V_low
        if torch.is_grad_enabled():
            o, i = len(u), v.shape[1]
            u = _Projected.apply(u, *((self.kept, True) if o > i else (self.start_U, False)))
            v = _Projected.apply(v.mT, *((self.kept, True) if i > o else (self.start_V.mT, False))).mT  # type: ignore
        start = self.start_U * self.start_S
        return torch.cat([v, v - self.start_V]), torch.cat([u * self.osf_S_low - start, start], 1)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        down, up = self._factors()
        return self.base.add_pointwise(y, self.base.apply(x, down).to(y.dtype), up)

    def exact_factors(self) -> Factors:
        down, up = self._factors()
        return Factors(down[None], up[None])

    def extra_repr(self) -> str:
        return f"effective_rank={self.effective_rank}"

    def checkpoint_keys(self) -> dict[str, str]:
        return {f"osf_{name}_low": f"osf_svd_params.{name}_low" for name in "USV"}
