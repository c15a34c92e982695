"""GraLoRA: W in k × k blocks, each with a LoRA of rank r/k: ΔW_jn = s B_jn A_jn, s = α/(r + h). arXiv:2505.20355.

Hybrid: a plain LoRA of rank h over the whole of W is added.
Shapes: i in_features, o out_features, k blocks per side of W, n index of an input block, j index of an output block,
c = r/k rank of a block. A (n, i/k, j·c) and B (j, n·c, o/k) are stored transposed; plain LoRA: A (h, i), B (o, h).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight
from peftcore.config import TunerConfig
from peftcore.errors import ConfigError
from peftcore.kernels.start_values import kaiming_uniform_
from peftcore.registry import register


@dataclass
class GraloraConfig(TunerConfig):
    """GraLoRA's options under PEFT's names."""

    not_saved_if_none: ClassVar[tuple[str, ...]] = ("exclude_modules",)

    r: int = 32
    """Rank (count). The parameters are as many as those of a LoRA of rank r; the rank of ΔW is up to r·gralora_k."""
    hybrid_r: int = 0
    """Rank of an additional plain LoRA (count); 0 for none."""
    alpha: float = 64
    """The update is scaled by alpha / (r + hybrid_r)."""
    gralora_dropout: float = 0.0
    """Probability of dropping an element of the adapter's input in training."""
    gralora_k: int = 2
    """Blocks on each side of W (count); must divide r, in_features and out_features."""
    bias: str = "none"
    """Biases of the model that train too: "none", "all" or "gralora_only"."""
    init_weights: bool = True
    """True: the adapter starts at zero; False: random, for tests."""
    fan_in_fan_out: bool = False
    """Read and saved for PEFT; without effect, because the orientation is found per layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r", "gralora_k")
        self.probability("gralora_dropout")
        self.one_of("bias", self.bias, ("none", "all", "gralora_only"))
        if not isinstance(self.hybrid_r, int) or self.hybrid_r < 0:
            raise ConfigError(f"GraloraConfig: hybrid_r must be 0 or a positive integer; got {self.hybrid_r!r}")
        if self.r % self.gralora_k:
            raise ConfigError(
                f"GraloraConfig: r must be a multiple of gralora_k={self.gralora_k}, got {self.r}; "
                f"try {-(-self.r // self.gralora_k) * self.gralora_k}"
            )


@register("GRALORA", GraloraConfig)
class Gralora(Adapter):
    """GraLoRA at one layer."""

    dropout_option = "gralora_dropout"

    def __init__(self, config: GraloraConfig, base: BaseWeight, path: str):
        super().__init__(config, base, path)
        i, o, r, h, k = base.in_features, base.out_features, config.r, config.hybrid_r, config.gralora_k
        if i % k or o % k:
            raise ConfigError(f"GRALORA: gralora_k must divide {i} and {o} at {path}, got {k}; try {math.gcd(i, o, k)}")
        self.k, self.scaling = k, config.alpha / (r + h)
        self.add_dropout()
        self.init = config.init_weights
        self.gralora_A = nn.Parameter(torch.empty(k, i // k, r))
        self.gralora_B = nn.Parameter(torch.empty(k, r, o // k))
        self.general_A = nn.Parameter(torch.empty(h, i)) if h else None
        self.general_B = nn.Parameter(torch.empty(o, h)) if h else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for down, up in zip(self.gralora_A, self.gralora_B, strict=True):  # blocks (i/k, r) and (r, o/k)
            down.copy_(kaiming_uniform_(torch.empty(down.T.shape, device="cpu")).T)
            up.zero_() if self.init else up.copy_(kaiming_uniform_(torch.empty(up.T.shape, device="cpu")).T)
        if self.general_A is not None and self.general_B is not None:
            for factor in (self.general_A, self.general_B, self.general_A):  # `nn.Linear`'s own values come first
                kaiming_uniform_(factor)
            nn.init.zeros_(self.general_B) if self.init else kaiming_uniform_(self.general_B)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = self.gralora_A.to(x.dtype), self.gralora_B.to(x.dtype)
        h = torch.einsum("...ni,nir->...nr", self.dropped(x).unflatten(-1, (self.k, -1)), a)
        h = h.unflatten(-1, (self.k, -1)).transpose(-3, -2).flatten(-2)  # (..., n, j·c) becomes (..., j, n·c)
        blocks = torch.einsum("...jr,jro->...jo", h * self.scaling, b.to(h.dtype)).flatten(-2)
        y = y + blocks.to(y.dtype)
        if self.general_A is None or self.general_B is None:
            return y
        h = self.base.apply(self.dropped(x), self.general_A).to(y.dtype) * self.scaling  # a mask of its own, as in PEFT
        return self.base.add_pointwise(y, h, self.general_B)

    def delta_weight(self) -> Tensor:
        a = self.gralora_A.unflatten(2, (self.k, -1))  # (n, i/k, j, c)
        b = self.gralora_B.unflatten(1, (self.k, -1))  # (j, n, c, o/k)
        delta = torch.einsum("nijc,jnco->joni", a, b).reshape(self.base.out_features, self.base.in_features)
        if self.general_A is not None and self.general_B is not None:
            delta = delta + self.general_B @ self.general_A
        return self.scaling * delta

    def checkpoint_keys(self) -> dict[str, str]:
        keys = {"gralora_A": "gralora_A", "gralora_B": "gralora_B"}
        if self.general_A is None:
            return keys
        return {**keys, "general_A": "gralora_A_general.weight", "general_B": "gralora_B_general.weight"}
