"""PVeRA: VeRA whose inner activation is drawn from a normal distribution that depends on x. arXiv:2512.07703.

y = Wx + b + Λ_b B z, z = μ + ε ⊙ exp(½ log σ²), ε ~ N(0, I), with (μ, log σ²) = Λ_d A x, the two halves of one product.
In training z is drawn, in evaluation z is its mean μ: PVeRA is then VeRA, and this is what merging adds to the weight.

Shapes: i in_features, o out_features, r rank, I and O the largest i and o of the adapted layers; A (2r, I) and
B (O, r), of which a layer takes the first i columns and o rows; Λ_d = diag(pvera_lambda_d) (2r,), Λ_b (o,).
"""

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
class PveraConfig(RandomProjectionConfig):
    """PVeRA's options under PEFT's names."""

    not_saved_if_none: ClassVar[tuple[str, ...]] = ("exclude_modules",)

    r: int = 256
    """Rank (count); larger than LoRA's, since only 2r + o numbers train per layer."""
    pvera_dropout: float = 0.0
    """Probability of dropping an element of the adapter's input in training."""
    d_initial: float = 0.1
    """Start value of every element of Λ_d."""
    bias: str = "none"
    """Biases of the model that train too: "none", "all" or "pvera_only"."""
    sample_at_inference: bool = False
    """Draw z in evaluation too; merging adds its mean all the same."""
    generator_seed: int | None = None
    """Seed of each layer's own generator of ε, on the CPU; None for PyTorch's default generator, the one that gradient
    checkpointing and `torch.compile` follow."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r")
        self.probability("pvera_dropout")
        self.one_of("bias", self.bias, ("none", "all", "pvera_only"))
        self._warn_of_unsaved("pvera_A and pvera_B", "projection_prng_key")


class Projections(Shared):
    """A and B, drawn on the CPU from the key so that every machine has the same."""

    pvera_A: Tensor
    pvera_B: Tensor

    def __init__(self, config: PveraConfig, largest_in: int, largest_out: int, device: torch.device):
        super().__init__()
        self.config, self.largest = config, (largest_in, largest_out)
        for name in ("pvera_A", "pvera_B"):
            self.register_buffer(name, torch.empty(0, device=device), persistent=config.save_projection)
        self.make_constants()

    def make_constants(self) -> None:
        r, (largest_in, largest_out) = self.config.r, self.largest
        generator = torch.Generator("cpu").manual_seed(self.config.projection_prng_key)
        for name, shape in (("pvera_A", (2 * r, largest_in)), ("pvera_B", (largest_out, r))):
            drawn = torch.empty(shape, dtype=torch.float32, device="cpu")
            nn.init.kaiming_uniform_(drawn, generator=generator)
            setattr(self, name, drawn.to(getattr(self, name)))


@register("PVERA", PveraConfig)
class Pvera(Adapter):
    """PVeRA at one layer."""

    dropout_option = "pvera_dropout"

    shared: Projections

    def __init__(self, config: PveraConfig, base: BaseWeight, path: str):
        super().__init__(config, base, path)
        self.config = config
        self.add_dropout()
        self.pvera_lambda_b = nn.Parameter(torch.empty(base.out_features))
        self.pvera_lambda_d = nn.Parameter(torch.empty(2 * config.r))
        seed = config.generator_seed
        self.generator = None if seed is None else torch.Generator("cpu").manual_seed(seed)

    @classmethod
    def make_shared(cls, config: PveraConfig, bases: Mapping[str, BaseWeight]) -> Projections:
        layers = list(bases.values())
        largest_in, largest_out = max(b.in_features for b in layers), max(b.out_features for b in layers)
        return Projections(config, largest_in, largest_out, layers[0].device)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.ones_(self.pvera_lambda_b)
        normal_(self.pvera_lambda_d)
        if self.config.init_weights:
            nn.init.zeros_(self.pvera_lambda_b)
            nn.init.constant_(self.pvera_lambda_d, self.config.d_initial)

    def _projections(self) -> tuple[Tensor, Tensor]:
        """Return A (2r, i), the rows of μ before those of log σ², and Λ_b B (o, r)."""
        device = self.pvera_lambda_b.device
        down = self.shared.pvera_A[:, : self.base.in_features].to(device)
        up = self.shared.pvera_B[: self.base.out_features].to(device)
        return down, self.pvera_lambda_b[:, None] * up

    def _mean_factors(self) -> tuple[Tensor, Tensor]:
        """Return A (r, i) and Λ_b B Λ_d (o, r), whose product is the change of the weight if z is its mean."""
        down, up = self._projections()
        return down[: self.config.r], up * self.pvera_lambda_d[: self.config.r]

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        if not (self.training or self.config.sample_at_inference):
            down, up = self._mean_factors()
            return self.base.add_pointwise(y, self.base.apply(self.dropped(x), down).to(y.dtype), up)
        down, up = self._projections()
        both = self.base.apply(self.dropped(x), down)
        mean, log_variance = (both * self.pvera_lambda_d.to(both.dtype)).chunk(2, dim=-1)
        z = mean + self._noise(mean) * torch.exp(log_variance / 2)
        return self.base.add_pointwise(y, z.to(y.dtype), up)

    def _noise(self, like: Tensor) -> Tensor:
        """Draw ε."""
        if self.generator is None:
            return torch.randn_like(like)
        return torch.randn(like.shape, dtype=like.dtype, device="cpu", generator=self.generator).to(like.device)

    def exact_factors(self) -> Factors:
        down, up = self._mean_factors()
        return Factors(down[None], up[None])
