"""RoCoFT: W' = W with its first r rows (or columns) replaced by W + ΔW. arXiv:2410.10075.

Shapes: o out_features, i in_features; rocoft_update (r, i) for rows, (o, r) for columns.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight
from peftcore.config import TunerConfig
from peftcore.errors import ConfigError
from peftcore.registry import register


@dataclass
class RocoftConfig(TunerConfig):
    """RoCoFT's options."""

    r: int = 3
    """Number of rows or columns that are trained."""
    part: Literal["rows", "columns"] = "rows"
    """Train rows (outputs) or columns (inputs) of the weight."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r < 1:
            raise ConfigError(f"RoCoFT: r must be at least 1, got {self.r}; try 3")
        if self.part not in ("rows", "columns"):
            raise ConfigError(f"RoCoFT: part must be rows or columns, got {self.part!r}")


@register("ROCOFT", RocoftConfig)
class Rocoft(Adapter):
    """RoCoFT at one linear layer."""

    def __init__(self, config: RocoftConfig, base: BaseWeight, path: str):
        super().__init__(config, base, path)
        rows, columns = base.out_features, base.in_features
        self.of_rows = config.part == "rows"
        if config.r > (rows if self.of_rows else columns):
            raise ConfigError(f"RoCoFT: {path} has {rows} rows and {columns} columns, fewer than r={config.r}")
        self.rocoft_update = nn.Parameter(torch.empty((config.r, columns) if self.of_rows else (rows, config.r)))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start at the base: the change is zero."""
        nn.init.zeros_(self.rocoft_update)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the change's product with the input, without making the whole ΔW."""
        update = self.rocoft_update.to(y.dtype)
        if self.of_rows:
            return y + nn.functional.pad(x @ update.T, (0, y.shape[-1] - update.shape[0]))
        return y + x[..., : update.shape[1]] @ update.T

    def delta_weight(self) -> Tensor:
        """Return ΔW (o, i), which is zero outside of the trained rows or columns."""
        update, base = self.rocoft_update, self.base
        if self.of_rows:
            return nn.functional.pad(update, (0, 0, 0, base.out_features - update.shape[0]))
        return nn.functional.pad(update, (0, base.in_features - update.shape[1]))
