"""LoRA: y = Wx + b + s·B(A x), s = α/r, or α/√r with rsLoRA. arXiv:2106.09685, arXiv:2312.03732.

Shapes: i in_features, o out_features, r rank, k kernel; A (r, i, *k), B (o, r, *1). On an embedding of v rows of
size d: A (r, v), B (d, r), and A starts at zero instead of B.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight
from peftcore.config import LORA_FAMILY_NEUTRAL, TunerConfig
from peftcore.errors import ConfigError, MergeError
from peftcore.registry import register


@dataclass
class LoraConfig(TunerConfig):
    """LoRA's options under PEFT's names."""

    ignored_on_disk: ClassVar[dict[str, Any]] = LORA_FAMILY_NEUTRAL

    r: int = 8
    """Rank (count)."""
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    """Probability of dropping an element of the adapter's input while training."""
    use_rslora: bool = False
    bias: str = "none"
    """Which biases of the model train too: "none", "all" or "lora_only"."""
    init_lora_weights: bool | str = True
    """True: the adapter starts at zero; "gaussian": A normal with deviation 1/r; False: random, for tests."""
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    """{path suffix or regular expression: r}; the first that matches a layer's path wins."""
    alpha_pattern: dict[str, float] | None = field(default_factory=dict)
    fan_in_fan_out: bool = False
    """Read from disk for PEFT's sake; the orientation is found per layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r")
        self.probability("lora_dropout")
        self.one_of("bias", self.bias, ("none", "all", "lora_only"))
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ConfigError(
                f"LoraConfig: init_lora_weights must be True, False or 'gaussian'; got {self.init_lora_weights!r}"
            )

    def at(self, path: str) -> tuple[int, float]:
        """(rank, alpha) of the layer at `path`, patterns applied."""
        return _first_match(self.rank_pattern, path, self.r), _first_match(self.alpha_pattern, path, self.lora_alpha)


def _first_match(pattern: dict[str, Any] | None, path: str, default: Any) -> Any:
    matching = (value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", path))
    return next(matching, default)


@register("LORA", LoraConfig)
class Lora(Adapter):
    """LoRA at one layer."""

    layer_kinds = frozenset({"linear", "conv", "embedding"})

    def __init__(self, config: LoraConfig, base: BaseWeight, path: str):
        super().__init__(config, base, path)
        r, alpha = config.at(path)
        groups = base.layer.groups if base.kind == "conv" else 1
        if r % groups:
            raise ConfigError(f"LORA: r at {path} must be a multiple of its {groups} groups, got {r}; try {groups}")
        self.scaling = alpha / math.sqrt(r) if config.use_rslora else alpha / r
        self.dropout = 0.0 if base.kind == "embedding" else config.lora_dropout
        self.init = config.init_lora_weights
        ones = (1,) * len(base.kernel)
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, *base.kernel))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, r // groups, *ones))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        starts_at_zero, other = self.lora_B, self.lora_A
        if self.base.kind == "embedding":
            starts_at_zero, other = other, starts_at_zero
        if self.init == "gaussian":
            nn.init.normal_(other, std=1 / self.lora_A.shape[0])
        elif self.base.kind == "embedding":
            nn.init.normal_(other)
        else:
            nn.init.kaiming_uniform_(other, a=math.sqrt(5))
        if self.init is False:
            nn.init.normal_(starts_at_zero, std=0.02)
        else:
            nn.init.zeros_(starts_at_zero)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        h = self.base.apply(x, self.lora_A)  # (..., r): scaling this costs less than scaling the output
        return self.base.add_pointwise(y, h.to(y.dtype) * self.scaling, self.lora_B)

    def check_mergeable(self) -> None:
        if self.lora_B.shape[1] != self.lora_A.shape[0]:
            raise MergeError(
                "LORA on a convolution with groups has no merged weight: A mixes the groups that W keeps apart; "
                "keep the adapter unmerged or exclude this layer"
            )

    def delta_weight(self) -> Tensor:
        product = self.lora_B.flatten(1) @ self.lora_A.flatten(1)
        return self.scaling * product.view(self.lora_B.shape[0], *self.lora_A.shape[1:])

    def checkpoint_keys(self) -> dict[str, str]:
        if self.base.kind == "embedding":
            return {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
        return {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
