"""LoKr: ΔW = s·(W₁ ⊗ W₂), either factor full or of rank r, s = α/r. arXiv:2309.14859, arXiv:2212.10650.

Shapes: o = a·b out_features, i = c·d in_features (of one group), r rank, k kernel; W₁ (a, c) or (a, r)(r, c); W₂
(b, d, *k) or (b, r)(r, d·k). With `use_effective_conv2d` W₂ = Σₓᵧ Tₓᵧ Aₓᵦ Bᵧᵟ: T (r, r, *k), A (r, b), B (r, d).
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight
from peftcore.config import TunerConfig, first_match
from peftcore.errors import ConfigError
from peftcore.files import CONFIG_NAME
from peftcore.kernels.maths import keep_rows, weight_shape
from peftcore.kernels.start_values import kaiming_uniform_
from peftcore.registry import register


@dataclass
class LoKrConfig(TunerConfig):
    """LoKr's options under PEFT's names."""

    size_fields: ClassVar[tuple[str, ...]] = ()  # a rank above all sizes asks for full matrices

    r: int = 8
    """Rank of a factor that is decomposed (count); a factor not larger than 2r stays full."""
    alpha: float = 8
    """The update is scaled by alpha / r."""
    rank_dropout: float = 0.0
    """Probability of dropping a row of ΔW in training."""
    rank_dropout_scale: bool = False
    """Scale the remaining rows, so that the mean stays the same."""
    module_dropout: float = 0.0
    """Probability of dropping the whole of ΔW in one forward pass in training."""
    decompose_both: bool = False
    """Decompose W₁ to rank r too."""
    decompose_factor: int = -1
    """Size to aim at for a and c; -1: the divisor nearest to the square root."""
    use_effective_conv2d: bool = False
    """Decompose convolutions with kernels larger than 1 over the kernel too."""
    init_weights: bool | str = True
    """True: W₁ starts at zero; "lycoris": W₂ does; False: random, for tests."""
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    """{path suffix or regular expression: r}; the first that matches a layer's path applies."""
    alpha_pattern: dict[str, float] | None = field(default_factory=dict)
    """{path suffix or regular expression: alpha}; the first that matches a layer's path applies."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r")
        self.probability("rank_dropout", "module_dropout")
        if self.decompose_factor != -1:
            self.positive("decompose_factor")
        if self.init_weights not in (True, False, "lycoris"):
            raise ConfigError(f"LoKrConfig: init_weights must be True, False or 'lycoris'; got {self.init_weights!r}")

    @classmethod
    def check_saved(cls, values: Mapping[str, Any]) -> None:
        if "rank_dropout_scale" not in values and values.get("alpha", 8) != values.get("r", 8):
            warnings.warn(
                f"LoKr: {CONFIG_NAME} has no rank_dropout_scale, so HF PEFT before 0.14 may have written it, which did "
                "not scale the update by alpha / r. Newer versions and peftcore do; if the adapter was trained "
                "without, write the value of r as alpha in that file (and ranks as alpha_pattern)",
                stacklevel=5,
            )

    def at(self, path: str) -> tuple[int, float]:
        """Return (rank, alpha) of the layer at `path`, patterns applied."""
        return first_match(self.rank_pattern, path, self.r), first_match(self.alpha_pattern, path, self.alpha)


def factorization(size: int, factor: int = -1) -> tuple[int, int]:
    """Return (m, n) with m·n = size: m is `factor` if it divides, else the largest divisor up to `factor` and √size."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    m = next(divisor for divisor in range(limit, 0, -1) if size % divisor == 0)
    return m, size // m


@register("LOKR", LoKrConfig)
class LoKr(Adapter):
    """LoKr at one layer."""

    layer_kinds = frozenset({"linear", "conv"})
    lokr_w1: nn.Parameter
    lokr_w1_a: nn.Parameter
    lokr_w1_b: nn.Parameter
    lokr_w2: nn.Parameter
    lokr_w2_a: nn.Parameter
    lokr_w2_b: nn.Parameter
    lokr_t2: nn.Parameter

    def __init__(self, config: LoKrConfig, base: BaseWeight, path: str):
        super().__init__(config, base, path)
        r, alpha = config.at(path)
        kernel = base.kernel
        self.shape = weight_shape(base)
        self.scaling = alpha / r
        self.dropouts = config.rank_dropout, config.module_dropout
        self.rescale = config.rank_dropout_scale
        self.init = config.init_weights
        (a, b), (c, d) = (factorization(size, config.decompose_factor) for size in self.shape[:2])
        self.inputs = (c, d)
        shapes: dict[str, tuple[int, ...]] = {}
        if config.decompose_both and r < max(a, c) / 2:
            shapes |= {"w1_a": (a, r), "w1_b": (r, c)}
        else:
            shapes["w1"] = (a, c)
        if r >= max(b, d) / 2:
            shapes["w2"] = (b, d, *kernel)
        elif config.use_effective_conv2d and any(size > 1 for size in kernel):
            shapes |= {"t2": (r, r, *kernel, *(1,) * (len(kernel) == 1)), "w2_a": (r, b), "w2_b": (r, d)}
        else:
            shapes |= {"w2_a": (b, r), "w2_b": (r, d * math.prod(kernel))}
        self.parts = frozenset(shapes)
        """Suffixes of the factors that this layer has."""
        for name, shape in shapes.items():
            self.register_parameter(f"lokr_{name}", nn.Parameter(torch.empty(shape)))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        zero = {True: ("w1", "w1_a"), "lycoris": ("w2", "w2_b"), False: ()}[self.init]
        for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"):
            if name in self.parts:
                parameter = self.get_parameter(f"lokr_{name}")
                nn.init.zeros_(parameter) if name in zero else kaiming_uniform_(parameter)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Return (W₁, W₂); W₂ is (b, d·k) if it is a product of two factors, else (b, d, *k)."""
        w1 = self.lokr_w1 if "w1" in self.parts else self.lokr_w1_a @ self.lokr_w1_b
        if "w2" in self.parts:
            return w1, self.lokr_w2
        if "t2" in self.parts:
            return w1, torch.einsum("xy...,xp,yq->pq...", self.lokr_t2, self.lokr_w2_a, self.lokr_w2_b)
        return w1, self.lokr_w2_a @ self.lokr_w2_b

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        if self.base.kind == "linear":
            w1, w2 = self._factors()
            w1, w2, x = w1.to(x.dtype), w2.to(x.dtype), x.unflatten(-1, self.inputs)
            delta = torch.einsum("...cd,bd,ac->...ab", x, w2, w1 * self.scaling).flatten(-2)
        else:
            delta = self.base.apply(x, self.delta_weight())
        kept = keep_rows(self.shape[0], delta, *self.dropouts, rescale=self.rescale) if self.training else None
        if kept is not None:
            delta = delta * self.base.per_output(kept)
        return y + delta.to(y.dtype)

    def delta_weight(self) -> Tensor:
        w1, w2 = self._factors()
        # PEFT's torch.kron pairs W₁'s axes with d and k for the full W₂ of a Conv1d
        axes = "ac,bdk->badck" if w2.ndim == 3 else "ac,bd...->abcd..."
        return self.scaling * torch.einsum(axes, w1, w2).reshape(self.shape)
