"""C3A: y = Wx + b + C x / i, where each b × b block of C is circulant, applied by FFT. arXiv:2407.19342.

Shapes: i in_features, o out_features, β block_size; c3a_kernel (o/β, i/β, β) holds the first row of each block, so a
block is C[t, j] = kernel[(j − t) mod β].
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.fft import irfft, rfft

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight
from peftcore.config import TunerConfig, first_match
from peftcore.errors import ConfigError
from peftcore.kernels.maths import widened
from peftcore.kernels.start_values import normal_, uniform_
from peftcore.registry import register

_STARTS = (True, False, "gaussian", "kaiming_uniform", "xavier_uniform")


@dataclass
class C3AConfig(TunerConfig):
    """C3A's options under PEFT's names."""

    not_saved_if_none: ClassVar[tuple[str, ...]] = ("exclude_modules",)

    block_size: int = 256
    """β; must divide the sizes of every adapted layer. A larger β means fewer parameters."""
    block_size_pattern: dict[str, int] | None = field(default_factory=dict)
    """{path suffix or regular expression: block_size}; the first that matches a layer's path applies."""
    bias: str = "none"
    """Biases of the model that train too: "none", "all" or "c3a_only"."""
    init_weights: bool | str = "xavier_uniform"
    """"xavier_uniform" (also False), "kaiming_uniform" or "gaussian"; True: the adapter starts at zero."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("block_size")
        self.one_of("bias", self.bias, ("none", "all", "c3a_only"))
        self.one_of("init_weights", self.init_weights, _STARTS)


@register("C3A", C3AConfig)
class C3A(Adapter):
    """C3A at one layer."""

    def __init__(self, config: C3AConfig, base: BaseWeight, path: str):
        super().__init__(config, base, path)
        block = first_match(config.block_size_pattern, path, config.block_size)
        common = math.gcd(base.in_features, base.out_features)
        if block < 1 or common % block:
            raise ConfigError(
                f"C3A: block_size at {path} must divide {base.in_features} inputs and {base.out_features} outputs; "
                f"got {block}; try {common} or a divisor of it"
            )
        self.init = config.init_weights
        self.c3a_kernel = nn.Parameter(torch.empty(base.out_features // block, base.in_features // block, block))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        i, o = self.base.in_features, self.base.out_features
        if self.init is True:
            nn.init.zeros_(self.c3a_kernel)
        elif self.init == "gaussian":
            normal_(self.c3a_kernel)
        else:
            bound = math.sqrt(1 / i) if self.init == "kaiming_uniform" else math.sqrt(6 / (i + o))
            uniform_(self.c3a_kernel, bound)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        if not x.numel():  # no FFT takes an empty batch
            return super().after(x, y)
        _, blocks, size = self.c3a_kernel.shape
        rows = widened(self.c3a_kernel)
        kernel = rfft(rows / self.base.in_features)
        spectrum = rfft(x.to(rows.dtype).unflatten(-1, (blocks, size)))
        product = torch.einsum("...nf,mnf->...mf", spectrum, kernel.conj())
        return y + irfft(product, n=size).flatten(-2).to(y.dtype)

    def delta_weight(self) -> Tensor:
        size = self.c3a_kernel.shape[-1]
        steps = torch.arange(size, device=self.c3a_kernel.device)
        circulant = self.c3a_kernel[..., (steps - steps[:, None]) % size]  # (o/β, i/β, β, β)
        return circulant.transpose(1, 2).reshape(self.base.out_features, self.base.in_features) / self.base.in_features
