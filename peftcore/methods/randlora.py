"""RandLoRA: ΔW = α/r · Σ_n B_n Λ_n A Γ_n, a full-rank sum over random frozen bases. arXiv:2502.00987.

A and the B_n are drawn once for all layers. A goes with the smaller side of a layer; ΔW is transposed where that is
the output.

Shapes: i in_features, o out_features, m = min(i, o), M = max(i, o), r rank of a basis, n = ⌈m / r⌉ bases;
A (r, 1, m), B (M, n, r), Λ = randlora_lambda (r, n), Γ = randlora_gamma (n, m); A and B have the size of the largest
layer and are cut to each. Flattened for the product, A runs over (r, n) and B over (n, r): PEFT pairs them so.
PEFT saves A and B once more for each layer; here they are saved once, and both forms are read.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from peftcore.adapter import Adapter, Shared
from peftcore.bases import BaseWeight
from peftcore.config import RandomProjectionConfig
from peftcore.kernels.start_values import normal_
from peftcore.registry import register


@dataclass
class RandLoraConfig(RandomProjectionConfig):
    """RandLoRA's options under PEFT's names."""

    not_saved_if_none: ClassVar[tuple[str, ...]] = ("exclude_modules",)

    r: int = 32
    """Rank of one random basis (count); a smaller one gives more bases and more parameters."""
    sparse: bool = False
    """Bases of −1, 0 and 1 with probabilities 1/6, 2/3 and 1/6."""
    very_sparse: bool = False
    """As sparse, with −1 and 1 each of probability 1/(2√m)."""
    randlora_dropout: float = 0.0
    """Probability of dropping an element of the adapter's input in training."""
    randlora_alpha: int = 640
    """The update is scaled by randlora_alpha / r."""
    bias: str = "none"
    """Biases of the model that train too: "none", "all" or "randlora_only"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r")
        self.probability("randlora_dropout")
        self.one_of("bias", self.bias, ("none", "all", "randlora_only"))
        self._warn_of_unsaved("basis_A and basis_B", "projection_prng_key")


class Bases(Shared):
    """A and B, drawn on the CPU from the key so that every machine has the same."""

    randlora_A: Tensor
    randlora_B: Tensor

    def __init__(self, config: RandLoraConfig, smaller: int, larger: int, device: torch.device):
        super().__init__()
        self.config, self.sizes = config, (smaller, larger)
        for name in ("randlora_A", "randlora_B"):
            empty = torch.empty(0, dtype=torch.float32, device=device)
            self.register_buffer(name, empty, persistent=config.save_projection)
        self.make_constants()

    def make_constants(self) -> None:
        config, (smaller, larger) = self.config, self.sizes
        generator = torch.Generator("cpu").manual_seed(config.projection_prng_key)
        bases = math.ceil(smaller / config.r)
        if config.sparse or config.very_sparse:
            rare = 1 / (2 * (math.sqrt(smaller) if config.very_sparse else 3))
            a = _ternary((config.r, 1, smaller), rare, generator)
            b = _ternary((larger, bases, config.r), rare, generator)
        else:
            a = _kaiming_uniform((config.r, 1, smaller), generator)
            b = torch.cat([_kaiming_uniform((larger, 1, config.r), generator) for _ in range(bases)], dim=1)
        self.randlora_A = (a / a.std()).to(torch.float32).to(self.randlora_A)
        self.randlora_B = (b / b.std()).to(torch.float32).to(self.randlora_B)


def _kaiming_uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    drawn = torch.empty(shape, dtype=torch.bfloat16, device="cpu")  # PEFT draws in this type: the numbers depend on it
    return nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)


def _ternary(shape: tuple[int, ...], rare: float, generator: torch.Generator) -> Tensor:
    drawn = torch.rand(shape, dtype=torch.float32, device="cpu", generator=generator)
    return (drawn > 1 - rare).float() - (drawn < rare).float()


@register("RANDLORA", RandLoraConfig)
class RandLora(Adapter):
    """RandLoRA at one layer."""

    dropout_option = "randlora_dropout"

    shared: Bases

    def __init__(self, config: RandLoraConfig, base: BaseWeight, path: str):
        super().__init__(config, base, path)
        self.config = config
        self.add_dropout()
        self.smaller, self.larger = sorted((base.in_features, base.out_features))
        bases = math.ceil(self.smaller / config.r)
        self.randlora_lambda = nn.Parameter(torch.empty(config.r, bases))
        self.randlora_gamma = nn.Parameter(torch.empty(bases, self.smaller))

    @classmethod
    def make_shared(cls, config: RandLoraConfig, bases: Mapping[str, BaseWeight]) -> Bases:
        layers = list(bases.values())
        smaller, larger = sorted((max(b.in_features for b in layers), max(b.out_features for b in layers)))
        return Bases(config, smaller, larger, layers[0].device)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        normal_(self.randlora_lambda)
        if self.config.init_weights:
            nn.init.zeros_(self.randlora_lambda)
            nn.init.constant_(self.randlora_gamma, 1 / max(self.randlora_gamma.shape))
        else:
            nn.init.constant_(self.randlora_gamma, 1 / self.larger)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Return (r·n, i) and (o, r·n), whose product is ΔW."""
        bases, device = len(self.randlora_gamma), self.randlora_gamma.device
        weights = self.randlora_lambda * (self.config.randlora_alpha / self.config.r)
        a = self.shared.randlora_A[:, :, : self.smaller].to(device)
        b = self.shared.randlora_B[: self.larger, :bases].to(device).flatten(1)
        a = (weights[:, :, None] * a * self.randlora_gamma).flatten(0, 1)
        return (a, b) if self.base.in_features == self.smaller else (b.T, a.T)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        down, up = self._factors()
        return self.base.add_pointwise(y, self.base.apply(self.dropped(x), down).to(y.dtype), up)

    def delta_weight(self) -> Tensor:
        down, up = self._factors()
        return up @ down
