"""BEFT: y = Wx + b + Δb, a trained addition to the bias, by default of the value projections. arXiv:2509.15974.

Shapes: o out_features; Δb = beft_bias (1, o).
PEFT adapts linear layers only; convolutions work here, too. At a layer without a bias, Δb is added to the output but
cannot be merged.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight
from peftcore.config import TunerConfig
from peftcore.errors import MergeError, PeftWarning
from peftcore.kernels.start_values import normal_
from peftcore.registry import register


@dataclass
class BeftConfig(TunerConfig):
    """BEFT's options under PEFT's names."""

    not_saved_if_none: ClassVar[tuple[str, ...]] = ("exclude_modules", "layers_pattern", "layers_to_transform")

    init_weights: bool = True
    """True: Δb starts at zero, so the adapter changes nothing; False: random, for tests."""


@register("BEFT", BeftConfig)
class Beft(Adapter):
    """BEFT at one layer."""

    layer_kinds = frozenset({"linear", "conv"})
    changes_weight = False

    def __init__(self, config: BeftConfig, base: BaseWeight, path: str):
        super().__init__(config, base, path)
        self.starts_at_zero, self.path = config.init_weights, path
        self.beft_bias = nn.Parameter(torch.empty(1, base.out_features))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        normal_(self.beft_bias)
        if self.starts_at_zero:
            nn.init.zeros_(self.beft_bias)

    @classmethod
    def link(cls, config: BeftConfig, adapters: Mapping[str, Adapter]) -> None:
        if without := [path for path, adapter in adapters.items() if adapter.base.bias is None]:
            warnings.warn(
                f"BEFT: {without[0]} has no bias ({len(without)} layers in all), so the adapter works but cannot be "
                "merged into its layers; to merge it, target layers with a bias",
                PeftWarning,
                stacklevel=2,
            )

    @property
    def is_additive(self) -> bool:
        return True

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.base.per_output(self.beft_bias.flatten()).to(y.dtype)

    def check_mergeable(self) -> None:
        if self.base.bias is None:
            raise MergeError(f"BEFT: {self.path} has no bias to merge into; keep the adapter unmerged")

    def merged_weight(self, weight: Tensor) -> Tensor:
        return weight

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        if bias is None:
            return self.beft_bias.flatten()
        return bias + self.beft_bias.flatten().to(bias)

    @classmethod
    def config_to_save(cls, config: BeftConfig, adapters: Mapping[str, Adapter]) -> BeftConfig:
        """Return the configuration with all paths named, if it has options of targets that PEFT's BEFT lacks."""
        if config.layers_to_transform is None and config.exclude_modules is None:
            return config
        return config.naming_targets(adapters)
