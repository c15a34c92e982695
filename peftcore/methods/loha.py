"""LoHa: ΔW = s·(A₁B₁ ⊙ A₂B₂), of rank up to r², s = α/r. arXiv:2108.06098.

Shapes: i in_features (of one group), o out_features, r rank, k kernel; A (o, r), B (r, i·k). With
`use_effective_conv2d` a convolution's factors are (A B T)ₚₑ = Σₓᵧ Tₓᵧ Aₓₚ Bᵧₑ: T (r, r, *k), A (r, o), B (r, i).
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight
from peftcore.config import TunerConfig, first_match
from peftcore.kernels.maths import keep_rows, weight_shape
from peftcore.kernels.start_values import kaiming_uniform_
from peftcore.registry import register


@dataclass
class LoHaConfig(TunerConfig):
    """LoHa's options under PEFT's names."""

    r: int = 8
    """Rank of each of the two products (count)."""
    alpha: float = 8
    """The update is scaled by alpha / r."""
    rank_dropout: float = 0.0
    """Probability of dropping a row of ΔW in training."""
    module_dropout: float = 0.0
    """Probability of dropping the whole of ΔW in one forward pass in training."""
    use_effective_conv2d: bool = False
    """Decompose convolutions with kernels larger than 1 over the kernel too (FedPara, proposition 3)."""
    init_weights: bool = True
    """True: the adapter starts at zero; False: random, for tests."""
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    """{path suffix or regular expression: r}; the first that matches a layer's path applies."""
    alpha_pattern: dict[str, float] | None = field(default_factory=dict)
    """{path suffix or regular expression: alpha}; the first that matches a layer's path applies."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r")
        self.probability("rank_dropout", "module_dropout")

    def at(self, path: str) -> tuple[int, float]:
        """Return (rank, alpha) of the layer at `path`, patterns applied."""
        return first_match(self.rank_pattern, path, self.r), first_match(self.alpha_pattern, path, self.alpha)


@register("LOHA", LoHaConfig)
class LoHa(Adapter):
    """LoHa at one layer."""

    layer_kinds = frozenset({"linear", "conv", "embedding"})
    hada_t1: nn.Parameter
    hada_t2: nn.Parameter

    def __init__(self, config: LoHaConfig, base: BaseWeight, path: str):
        super().__init__(config, base, path)
        r, alpha = config.at(path)
        self.shape = weight_shape(base)
        self.scaling = alpha / r
        self.dropouts = config.rank_dropout, config.module_dropout
        self.starts_at_zero = config.init_weights
        self.over_kernel = config.use_effective_conv2d and any(size > 1 for size in base.kernel)
        o, i = self.shape[:2]
        columns = math.prod(self.shape[1:])
        # as one product of rank r² it costs less than ΔW itself, unless the layer is small
        self.as_product = not self.over_kernel and i == base.in_features and r * r * (o + columns) <= o * columns
        for n in (1, 2):
            if self.over_kernel:
                kernel = base.kernel if len(base.kernel) > 1 else (*base.kernel, 1)
                shapes = {f"t{n}": (r, r, *kernel), f"w{n}_a": (r, o), f"w{n}_b": (r, i)}
            else:
                shapes = {f"w{n}_a": (o, r), f"w{n}_b": (r, columns)}
            for name, shape in shapes.items():
                self.register_parameter(f"hada_{name}", nn.Parameter(torch.empty(shape)))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"):
            parameter = self._parameters.get(f"hada_{name}")
            if name == "w2_b" and self.starts_at_zero:
                nn.init.zeros_(self.get_parameter("hada_w2_b"))
            elif parameter is not None:
                kaiming_uniform_(parameter)

    def _factors(self, side: str) -> tuple[Tensor, Tensor]:
        return getattr(self, f"hada_w1_{side}"), getattr(self, f"hada_w2_{side}")

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        kept = keep_rows(self.shape[0], self._factors("a")[0], *self.dropouts, rescale=True) if self.training else None
        if not self.as_product:
            delta = self.delta_weight()
            if kept is not None:
                delta = delta * kept.view(-1, *(1 for _ in self.shape[1:]))
            return y + self.base.apply(x, delta).to(y.dtype)
        # (A₁B₁ ⊙ A₂B₂) = AB with rows of A the products of all pairs of A₁'s and A₂'s columns, B's likewise
        (a1, a2), (b1, b2) = self._factors("a"), self._factors("b")
        a, b = (a1[:, :, None] * a2[:, None]).flatten(1), (b1[:, None] * b2[None]).flatten(0, 1)
        if kept is not None:
            a = a * kept[:, None]
        h = self.base.apply(x, b.view(-1, *self.shape[1:]))
        a = a.view(*a.shape, *(1 for _ in self.base.kernel))
        return self.base.add_pointwise(y, h.to(y.dtype) * self.scaling, a)

    def delta_weight(self) -> Tensor:
        (a1, a2), (b1, b2) = self._factors("a"), self._factors("b")
        if not self.over_kernel:
            return self.scaling * ((a1 @ b1) * (a2 @ b2)).view(self.shape)
        first, second = (
            torch.einsum("xy...,xp,yq->pq...", t, a, b) for t, a, b in ((self.hada_t1, a1, b1), (self.hada_t2, a2, b2))
        )
        return self.scaling * (first * second).view(self.shape)
