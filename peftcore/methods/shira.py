"""SHiRA: W' = W + a sparse matrix of r(o + i) trained entries, as many as LoRA's but of high rank. arXiv:2406.13175.

Shapes: i in_features, o out_features, n = r(o + i); shira_weight (n,), shira_indices (2, n), rows and columns of the
entries in row-major order. A convolution's kernel counts with the inputs: i/groups · kernel columns.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight
from peftcore.config import TunerConfig
from peftcore.errors import ConfigError
from peftcore.kernels.maths import random_places, weight_shape
from peftcore.kernels.start_values import normal_
from peftcore.registry import register


@dataclass
class ShiraConfig(TunerConfig):
    """SHiRA's options under PEFT's names."""

    not_saved_if_none: ClassVar[tuple[str, ...]] = ("exclude_modules", "layers_pattern", "layers_to_transform")

    r: int = 32
    """Rank of the LoRA with the same number of trained entries; it does not limit the rank of ΔW."""
    mask_type: str = "random"
    """"random", or any other name for a mask that `mask_fn` returns."""
    mask_fn: Callable[[nn.Module, int], Tensor] | None = field(default=None, repr=False, compare=False)
    """Function of (base layer, r) that returns a mask (o, i) with r(o + i) ones; not saved."""
    random_seed: int | None = None
    """Seed of the random mask; None: torch's default seed."""
    init_weights: bool = True
    """True: the adapter starts at zero; False: normal, for tests."""
    fan_in_fan_out: bool = False
    """Read and saved for PEFT; without effect, because the orientation is found per layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r")

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().to_dict().items() if key != "mask_fn"}


@register("SHIRA", ShiraConfig)
class Shira(Adapter):
    """SHiRA at one layer."""

    layer_kinds = frozenset({"linear", "conv", "embedding"})
    places: Tensor | None

    def __init__(self, config: ShiraConfig, base: BaseWeight, path: str):
        super().__init__(config, base, path)
        self.config, self.path = config, path
        self.shape = weight_shape(base)
        self.rows, self.columns = self.shape[0], math.prod(self.shape[1:])
        self.count = config.r * (self.rows + self.columns)
        if self.count > self.rows * self.columns:
            raise ConfigError(
                f"SHIRA: r={config.r} at {path} asks for {self.count} entries of a weight of "
                f"{self.rows * self.columns}; r fits up to {self.rows * self.columns // (self.rows + self.columns)}"
            )
        self.shira_weight = nn.Parameter(torch.empty(self.count))
        self.make_constants()

    def make_constants(self) -> None:
        places = self._choose()
        self.register_buffer("places", None if places is None else places.to(self.shira_weight.device), False)

    def _choose(self) -> Tensor | None:
        """Return the flat indices of the trained entries; None if only a saved adapter has them."""
        if self.config.mask_fn is not None:
            mask = self.config.mask_fn(self.base.layer, self.config.r)
            places = mask.reshape(-1).nonzero().flatten()
            if mask.numel() != self.rows * self.columns or len(places) != self.count:
                raise ConfigError(
                    f"SHIRA: mask_fn at {self.path} must return a mask of {self.rows} x {self.columns} with "
                    f"{self.count} ones; got {len(places)} ones in {tuple(mask.shape)}"
                )
        elif self.config.mask_type == "random":
            places = random_places(self.rows * self.columns, self.count, self.config.random_seed).sort().values
        else:
            return None
        return places

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.config.init_weights:
            nn.init.zeros_(self.shira_weight)
        else:
            normal_(self.shira_weight)

    def _known_places(self) -> Tensor:
        if self.places is None:
            raise ConfigError(
                f"SHIRA: mask_type={self.config.mask_type!r} needs config.mask_fn, a function that returns the mask; "
                "set it, or take mask_type='random'"
            )
        return self.places

    def delta_weight(self) -> Tensor:
        flat = self.shira_weight.new_zeros(self.rows * self.columns).scatter(0, self._known_places(), self.shira_weight)
        return flat.view(self.shape)

    # -- disk: the places are saved beside the weights ---------------------------------------------------------------

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        places = torch.zeros(self.count, dtype=torch.long) if self.places is None else self.places
        indices = torch.stack([places // self.columns, places % self.columns]).int()
        return {"shira_weight": self.shira_weight.detach(), "shira_indices": indices}

    @torch.no_grad()
    def load_checkpoint_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.shira_weight.copy_(tensors["shira_weight"])
        rows, columns = tensors["shira_indices"].to(self.shira_weight.device, torch.long)
        self.places = rows * self.columns + columns

    @classmethod
    def config_to_save(cls, config: ShiraConfig, adapters: Mapping[str, Adapter]) -> ShiraConfig:
        for adapter in cast(Mapping[str, Shira], adapters).values():
            adapter._known_places()  # raises before anything is written without places
        return config
