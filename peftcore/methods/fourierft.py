"""FourierFT: ΔW = α · Re(IDFT₂(F)), where n entries of the spectrum F train and the others are zero. arXiv:2405.03003.

The trained entries lie at random places, the same for all layers of one shape.

Shapes: i in_features, o out_features, n n_frequency; fourierft_spectrum (n,), F and ΔW (o, i). A convolution's kernel
counts with the inputs: i/groups · kernel columns.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight
from peftcore.config import TunerConfig, first_match
from peftcore.errors import ConfigError
from peftcore.kernels.maths import random_places, weight_shape, widened
from peftcore.kernels.start_values import normal_
from peftcore.registry import register


@dataclass
class FourierFTConfig(TunerConfig):
    """FourierFT's options under PEFT's names."""

    size_fields: ClassVar[tuple[str, ...]] = ("n_frequency", "n_frequency_pattern")

    n_frequency: int = 1000
    """Trained entries of each layer's spectrum (count)."""
    scaling: float = 150.0
    """α."""
    random_loc_seed: int = 777
    """Seed of the positions of the trained entries."""
    n_frequency_pattern: dict[str, int] | None = field(default_factory=dict)
    """{path suffix or regular expression: n_frequency}; the first that matches a layer's path applies."""
    bias: str = "none"
    """Biases of the model that train too: "none", "all" or "fourier_only"."""
    init_weights: bool = False
    """True: the spectrum starts at zero; False: standard normal, as in the paper."""
    fan_in_fan_out: bool = False
    """Read and saved for PEFT; without effect, because the orientation is found per layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("n_frequency")
        self.one_of("bias", self.bias, ("none", "all", "fourier_only"))
        if not isinstance(self.random_loc_seed, int):
            raise ConfigError(f"FourierFTConfig: random_loc_seed must be an integer; got {self.random_loc_seed!r}")


@register("FOURIERFT", FourierFTConfig)
class FourierFT(Adapter):
    """FourierFT at one layer."""

    layer_kinds = frozenset({"linear", "conv", "embedding"})
    places: Tensor

    def __init__(self, config: FourierFTConfig, base: BaseWeight, path: str):
        super().__init__(config, base, path)
        self.config = config
        self.shape = weight_shape(base)
        count, size = first_match(config.n_frequency_pattern, path, config.n_frequency), math.prod(self.shape)
        if not 1 <= count <= size:
            raise ConfigError(f"FOURIERFT: n_frequency at {path} must be between 1 and the {size} weights; got {count}")
        self.fourierft_spectrum = nn.Parameter(torch.empty(count))
        self.make_constants()

    def make_constants(self) -> None:
        places = random_places(math.prod(self.shape), len(self.fourierft_spectrum), self.config.random_loc_seed)
        self.register_buffer("places", places.to(self.fourierft_spectrum.device), persistent=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        normal_(self.fourierft_spectrum)
        if self.config.init_weights:
            nn.init.zeros_(self.fourierft_spectrum)

    def delta_weight(self) -> Tensor:
        spectrum = widened(self.fourierft_spectrum)
        flat = spectrum.new_zeros(math.prod(self.shape)).scatter(0, self.places, spectrum)
        wave = torch.fft.ifft2(flat.view(self.shape[0], -1)).real
        return self.config.scaling * wave.view(self.shape)
