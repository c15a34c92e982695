"""Uni-LoRA: y = Wx + b + B(A x), where one trained vector θ fills the A and B of all layers. arXiv:2506.00799.

An entry of A or B is θ_j / √n_j: a fixed random projection gives each entry its index j, and n_j entries have index j.
The columns of the projection are therefore orthonormal.

Shapes: i in_features, o out_features, r rank, d theta_d_length; θ (d,), indices of A (r, i), indices of B (o, r).
The indices of all layers, in the model's order, are one shuffled list in which each index occurs equally often.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from peftcore.adapter import Adapter, Shared
from peftcore.bases import BaseWeight
from peftcore.config import TunerConfig
from peftcore.errors import CheckpointError, ConfigError
from peftcore.kernels.factors import Factors
from peftcore.kernels.start_values import normal_, uniform_
from peftcore.registry import register


@dataclass
class UniLoraConfig(TunerConfig):
    """Uni-LoRA's options under PEFT's names."""

    not_saved_if_none: ClassVar[tuple[str, ...]] = ("exclude_modules",)
    size_fields: ClassVar[tuple[str, ...]] = ("theta_d_length",)

    r: int = 4
    """Rank (count)."""
    proj_seed: int = 42
    """Seed of the indices."""
    theta_d_length: int = 256
    """Length of θ: the number of trained parameters of the whole adapter."""
    unilora_dropout: float = 0.0
    """Probability of dropping an element of the adapter's input in training."""
    init_theta_d_bound: float = 0.02
    """Bound of the uniform start values of θ; at zero, no gradient would reach θ."""
    init_weights: bool = True
    """True: θ starts uniform; False: normal, for tests."""
    save_indices: bool = False
    """Save the indices and scales of each layer; without them, loading draws them again from the seed."""
    bias: str = "none"
    """Biases of the model that train too: "none", "all" or "unilora_only"."""
    fan_in_fan_out: bool = False
    """Read and saved for PEFT; without effect, because the orientation is found per layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r", "theta_d_length")
        self.probability("unilora_dropout")
        self.one_of("bias", self.bias, ("none", "all", "unilora_only"))
        if self.init_theta_d_bound <= 0:
            raise ConfigError(
                f"UniLoraConfig: init_theta_d_bound must be positive; got {self.init_theta_d_bound}; try 0.02"
            )


@lru_cache(maxsize=1)
def balanced_indices(count: int, length: int, seed: int) -> Tensor:
    """Draw indices (count,) below `length`, each equally often up to one, by the same random numbers as HF PEFT.

    The last result is cached, because every layer takes its part of it; the result must not be modified.
    """
    random = np.random.default_rng(seed)
    repeats, rest = divmod(count, length)
    indices = np.tile(np.arange(length), (repeats, 1)).T.ravel()  # 0 0 0 1 1 1 ...
    if rest:
        indices = np.append(indices, random.choice(length, size=rest, replace=False))
    random.shuffle(indices)
    return torch.from_numpy(indices)


class Theta(Shared):
    """θ, and for each of its elements the scale 1/√n."""

    scales: Tensor

    def __init__(self, config: UniLoraConfig, bases: Mapping[str, BaseWeight]):
        super().__init__()
        self.config = config
        sizes = [config.r * (base.in_features + base.out_features) for base in bases.values()]
        self.starts = dict(zip(bases, accumulate(sizes, initial=0), strict=False))
        """{path: position of the layer's first index in the list of all}"""
        self.count = sum(sizes)
        self.unilora_theta_d = nn.Parameter(torch.empty(config.theta_d_length))
        self.register_buffer("scales", torch.empty(config.theta_d_length), persistent=False)
        self.make_constants()

    def make_constants(self) -> None:
        counts = self.indices().bincount(minlength=len(self.scales))
        self.scales = counts.clamp(min=1).float().rsqrt().to(self.scales)

    def indices(self) -> Tensor:
        """Return the indices of all layers."""
        return balanced_indices(self.count, self.config.theta_d_length, self.config.proj_seed)


@register("UNILORA", UniLoraConfig)
class UniLora(Adapter):
    """Uni-LoRA at one layer."""

    dropout_option = "unilora_dropout"

    shared: Theta
    unilora_indices_A: Tensor
    unilora_indices_B: Tensor

    def __init__(self, config: UniLoraConfig, base: BaseWeight, path: str):
        super().__init__(config, base, path)
        self.config, self.path = config, path
        self.add_dropout()
        for side, shape in (("A", (config.r, base.in_features)), ("B", (base.out_features, config.r))):
            self.register_buffer(f"unilora_indices_{side}", torch.empty(shape, dtype=torch.long), persistent=False)

    @classmethod
    def make_shared(cls, config: UniLoraConfig, bases: Mapping[str, BaseWeight]) -> Theta:
        return Theta(config, bases)

    def make_constants(self) -> None:
        if self.shared is None:  # cast on the meta device, before the adapter is complete
            return
        a, b = self.unilora_indices_A, self.unilora_indices_B
        start = self.shared.starts[self.path]
        drawn = self.shared.indices()[start : start + a.numel() + b.numel()].split([a.numel(), b.numel()])
        for indices, part in zip((a, b), drawn, strict=True):
            indices.copy_(part.view(indices.shape))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        config, theta = self.config, self.shared.unilora_theta_d
        if not self.shared.starts[self.path]:  # the first layer
            uniform_(theta, config.init_theta_d_bound) if config.init_weights else normal_(theta)
        for indices in (self.unilora_indices_A, self.unilora_indices_B):
            torch.randint(config.theta_d_length, indices.shape, device="cpu")  # PEFT draws these and replaces them
        self.make_constants()

    def prepare_to_read(self) -> None:
        self.make_constants()

    @property
    def unilora_scales_A(self) -> Tensor:
        """Scales (r, i) of the entries of A."""
        return self.shared.scales.to(self.base.device)[self.unilora_indices_A]

    @property
    def unilora_scales_B(self) -> Tensor:
        """Scales (o, r) of the entries of B."""
        return self.shared.scales.to(self.base.device)[self.unilora_indices_B]

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Return A (r, i) and B (o, r)."""
        a, b = self.unilora_indices_A, self.unilora_indices_B
        vector = (self.shared.unilora_theta_d * self.shared.scales).to(a.device)
        return vector[a], vector[b]

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        down, up = self._factors()
        return self.base.add_pointwise(y, self.base.apply(self.dropped(x), down).to(y.dtype), up)

    def exact_factors(self) -> Factors:
        down, up = self._factors()
        return Factors(down[None], up[None])

    # -- disk: with `save_indices`, the indices and the scales of each layer ------------------------------------------

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        if not self.config.save_indices:
            return {}
        names = (f"unilora_{kind}_{side}" for kind in ("indices", "scales") for side in "AB")
        return {name: getattr(self, name) for name in names}

    @torch.no_grad()
    def load_checkpoint_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        scales = self.shared.scales
        for side in "AB" if tensors else "":
            indices = tensors[f"unilora_indices_{side}"]
            if indices.min() < 0 or indices.max() >= len(scales):
                raise CheckpointError(
                    f"UNILORA: indices at {self.path} must be below theta_d_length={len(scales)}; got "
                    f"{indices.min().item()} to {indices.max().item()}; the file is damaged"
                )
            self.get_buffer(f"unilora_indices_{side}").copy_(indices)
            scales[indices.to(scales.device, torch.long)] = tensors[f"unilora_scales_{side}"].to(scales)
