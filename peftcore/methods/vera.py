"""VeRA: y = Wx + b + Λ_b B Λ_d A x, where all layers share one random frozen A and B. arXiv:2310.11454.

Shapes: i in_features, o out_features, r rank, I and O the largest i and o of the adapted layers; A (r, I) and
B (O, r), of which a layer takes the first i columns and o rows; Λ_d = diag(vera_lambda_d) (r,), Λ_b (o,).
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
from peftcore.kernels.factors import Factors
from peftcore.kernels.start_values import normal_
from peftcore.registry import register


@dataclass
class VeraConfig(RandomProjectionConfig):
    """VeRA's options under PEFT's names."""

    not_saved_if_none: ClassVar[tuple[str, ...]] = ("exclude_modules",)

    r: int = 256
    """Rank (count); larger than LoRA's, since only r + o numbers train per layer."""
    vera_dropout: float = 0.0
    """Probability of dropping an element of the adapter's input in training."""
    d_initial: float = 0.1
    """Start value of every element of Λ_d."""
    bias: str = "none"
    """Biases of the model that train too: "none", "all" or "vera_only"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r")
        self.probability("vera_dropout")
        self.one_of("bias", self.bias, ("none", "all", "vera_only"))
        self._warn_of_unsaved("vera_A and vera_B", "projection_prng_key")


class Projections(Shared):
    """A and B, drawn on the CPU from the key so that every machine has the same."""

    vera_A: Tensor
    vera_B: Tensor

    def __init__(self, config: VeraConfig, largest_in: int, largest_out: int, device: torch.device):
        super().__init__()
        self.config, self.largest = config, (largest_in, largest_out)
        for name in ("vera_A", "vera_B"):
            self.register_buffer(name, torch.empty(0, device=device), persistent=config.save_projection)
        self.make_constants()

    def make_constants(self) -> None:
        config, (largest_in, largest_out) = self.config, self.largest
        generator = torch.Generator("cpu").manual_seed(config.projection_prng_key)
        self.vera_A = _kaiming_uniform((config.r, largest_in), generator).to(self.vera_A)
        self.vera_B = _kaiming_uniform((largest_out, config.r), generator).to(self.vera_B)


def _kaiming_uniform(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    bound = math.sqrt(3) * (math.sqrt(2) / math.sqrt(shape[1]))
    return torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)


@register("VERA", VeraConfig)
class Vera(Adapter):
    """VeRA at one layer."""

    dropout_option = "vera_dropout"

    shared: Projections

    def __init__(self, config: VeraConfig, base: BaseWeight, path: str):
        super().__init__(config, base, path)
        self.config = config
        self.add_dropout()
        self.vera_lambda_b = nn.Parameter(torch.empty(base.out_features))
        self.vera_lambda_d = nn.Parameter(torch.empty(config.r))

    @classmethod
    def make_shared(cls, config: VeraConfig, bases: Mapping[str, BaseWeight]) -> Projections:
        layers = list(bases.values())
        largest_in, largest_out = max(b.in_features for b in layers), max(b.out_features for b in layers)
        return Projections(config, largest_in, largest_out, layers[0].device)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.ones_(self.vera_lambda_b)
        normal_(self.vera_lambda_d)
        if self.config.init_weights:
            nn.init.zeros_(self.vera_lambda_b)
            nn.init.constant_(self.vera_lambda_d, self.config.d_initial)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Return A (r, i) and Λ_b B Λ_d (o, r)."""
        device = self.vera_lambda_b.device
        down = self.shared.vera_A[:, : self.base.in_features].to(device)
        up = self.shared.vera_B[: self.base.out_features].to(device)
        return down, self.vera_lambda_b[:, None] * up * self.vera_lambda_d

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        down, up = self._factors()
        return self.base.add_pointwise(y, self.base.apply(self.dropped(x), down).to(y.dtype), up)

    def exact_factors(self) -> Factors:
        down, up = self._factors()
        return Factors(down[None], up[None])
