"""Lily: y = Wx + b + s · (Σ_e p_e B_e) A x, with A shared by neighbouring layers and the B_e by all. arXiv:2407.09946.

p is the mean of softmax(R A x) over all tokens of the batch, so the output for a token depends on the others. R is each
layer's own. Layers share with layers of the same shape and the same entry of `target_modules` only: with ["q_proj",
"v_proj"] a q_proj shares nothing with a v_proj. With a regular expression, all layers of one shape share.

Shapes: i in_features, o out_features, r rank, e experts; A = lily_A (r, i), R = lily_router (e, r), lily_B (e·r, o),
which holds the transposed B_e (o, r) one below the other. PEFT and this library save shared tensors once per layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight
from peftcore.config import TunerConfig
from peftcore.errors import ConfigError, MergeError
from peftcore.kernels.maths import widened
from peftcore.kernels.start_values import kaiming_uniform_
from peftcore.registry import register


@dataclass
class LilyConfig(TunerConfig):
    """Lily's options under PEFT's names."""

    r: int = 32
    """Rank of the change (count); larger than LoRA's, since fewer tensors train."""
    stride_A: int = 1
    """Consecutive layers that share one A (count)."""
    num_B: int = 2
    """Experts B_e, which all layers share (count); at least 2."""
    scaling: float = 1.0
    """s."""
    init_weights: bool = True
    """True: the adapter starts at zero; False: random, for tests."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r", "stride_A")
        if self.num_B < 2:
            raise ConfigError(f"LilyConfig: num_B must be at least 2, for the router to choose; got {self.num_B}")


@register("LILY", LilyConfig)
class Lily(Adapter):
    """Lily at one layer."""

    def __init__(self, config: LilyConfig, base: BaseWeight, path: str):
        super().__init__(config, base, path)
        self.scaling, self.experts, self.starts_at_zero = config.scaling, config.num_B, config.init_weights
        self.lily_A = nn.Parameter(torch.empty(config.r, base.in_features))
        self.lily_B = nn.Parameter(torch.empty(config.num_B * config.r, base.out_features))
        self.lily_router = nn.Parameter(torch.empty(config.num_B, config.r))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for parameter in (self.lily_A, self.lily_B, self.lily_router, self.lily_A, self.lily_router):
            kaiming_uniform_(parameter)  # PEFT draws default values of three layers first
        nn.init.zeros_(self.lily_B) if self.starts_at_zero else kaiming_uniform_(self.lily_B)

    @classmethod
    def link(cls, config: LilyConfig, adapters: Mapping[str, Adapter]) -> None:
        groups: dict[tuple[str, int, int], list[Lily]] = {}
        for path, adapter in cast(Mapping[str, Lily], adapters).items():
            names = config.target_modules
            ends = [names] if isinstance(names, str) else [name for name in names or () if path.endswith(name)]
            name = max(ends, key=len, default=path)
            groups.setdefault((name, adapter.base.out_features, adapter.base.in_features), []).append(adapter)
        for layers in groups.values():
            for number, adapter in enumerate(layers):
                adapter.lily_A = layers[number - number % config.stride_A].lily_A
                adapter.lily_B = layers[0].lily_B

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.base.apply(x, self.lily_A)
        choice = widened(F.linear(h, self.lily_router.to(h.dtype))).softmax(-1)
        p = choice.reshape(-1, self.experts).mean(0).to(self.lily_B.dtype)
        up = torch.einsum("e,ero->or", self.scaling * p, self.lily_B.unflatten(0, (self.experts, -1)))
        return self.base.add_pointwise(y, h.to(y.dtype), up)

    def check_mergeable(self) -> None:
        raise MergeError("LILY mixes its experts anew for each batch, so no fixed weight equals the adapter")

    def checkpoint_keys(self) -> dict[str, str]:
        return {name: f"{name}.weight" for name in ("lily_A", "lily_B", "lily_router")}
