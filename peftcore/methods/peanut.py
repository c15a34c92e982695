"""PEANuT: ΔW = s·(f(WᵀAᵀ) Bᵀ)ᵀ, a small network f that computes the change from the weight itself. arXiv:2410.01870.

h₀ = σ(WᵀAᵀ); each of `depth` encoders gives hₖ = σ(hₖ₋₁Eₖᵀ); then each decoder gives h ← σ(hDₖᵀ) + the hⱼ of the same
level, down to h₀; f is the last h.

Shapes: i in_features, o out_features, r width of the network; A (r, o), Eₖ and Dₖ (r, r), B (o, r), each h (i, r). W is
the weight without merged changes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight
from peftcore.config import TunerConfig
from peftcore.errors import ConfigError, suggestion
from peftcore.kernels.start_values import kaiming_uniform_
from peftcore.registry import register


@dataclass
class PeanutConfig(TunerConfig):
    """PEANuT's options under PEFT's names."""

    r: int = 32
    """Width of the network (count); it bounds the rank of the change."""
    depth: int = 0
    """Encoders, and as many decoders, between A and B (count)."""
    act_fn: str = "relu"
    """Activation σ: a name of `transformers.activations.ACT2FN`."""
    scaling: float = 1.0
    """Factor s of the change."""
    init_weights: bool = True
    """True: B starts at zero; False: random, for tests."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r")
        if self.depth < 0:
            raise ConfigError(f"PeanutConfig: depth must be 0 or a positive integer; got {self.depth}; try 0")
        if self.act_fn not in ACT2FN:
            raise ConfigError(f"PeanutConfig: unknown act_fn {self.act_fn!r}{suggestion(self.act_fn, ACT2FN)}")


@register("PEANUT", PeanutConfig)
class Peanut(Adapter):
    """PEANuT at one layer."""

    def __init__(self, config: PeanutConfig, base: BaseWeight, path: str):
        super().__init__(config, base, path)
        r, o = config.r, base.out_features
        self.config, self.scaling = config, config.scaling
        self.peanut_A = nn.Parameter(torch.empty(r, o))
        self.peanut_encoders = nn.ParameterList(torch.empty(r, r) for _ in range(config.depth))
        self.peanut_decoders = nn.ParameterList(torch.empty(r, r) for _ in range(config.depth))
        self.peanut_B = nn.Parameter(torch.empty(o, r))

    @property
    def res_num(self) -> int:
        """Number of encoders (count), under the name that HF PEFT's layers have for it."""
        return self.config.depth

    @torch.no_grad()
    def reset_parameters(self) -> None:
        inner = [self.peanut_A, *self.peanut_encoders, *self.peanut_decoders]
        for weight in (*inner, self.peanut_B, *inner):  # PEFT draws all but B twice
            kaiming_uniform_(weight)
        self.peanut_B.zero_() if self.config.init_weights else kaiming_uniform_(self.peanut_B)

    def delta_weight(self) -> Tensor:
        activation = ACT2FN[self.config.act_fn]
        weight = self.base.read_unmerged().to(self.peanut_A.dtype)
        levels = [activation(weight.T @ self.peanut_A.T)]
        for encoder in self.peanut_encoders:
            levels.append(activation(F.linear(levels[-1], encoder)))
        h = levels.pop()
        for decoder in self.peanut_decoders:
            h = activation(F.linear(h, decoder)) + levels.pop()
        return self.scaling * F.linear(h, self.peanut_B).T

    def checkpoint_keys(self) -> dict[str, str]:
        return {name: f"{name}.weight" for name in super().checkpoint_keys()}
