"""DeLoRA: ΔW = B diag(λ/(r ‖A_k‖ ‖B_k‖)) A diag(w), so λ bounds ‖ΔW‖ whatever A and B are. arXiv:2503.18225.

w are the lengths of W₀'s columns, taken once and saved: base weights that were merged into do not change them.
Shapes: i in_features, o out_features, r rank, A_k row and B_k column k; A (r, i), B (o, r), λ (1), w (i).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight
from peftcore.config import TunerConfig, first_match
from peftcore.kernels.start_values import kaiming_uniform_
from peftcore.registry import register

SHORTEST = 1e-4
"""Smallest length in the denominator, so that B = 0 has a gradient."""


@dataclass
class DeloraConfig(TunerConfig):
    """DeLoRA's options under PEFT's names."""

    r: int = 8
    """Rank (count)."""
    delora_lambda: float = 15
    """λ at the start; it trains."""
    module_dropout: float = 0.0
    """Probability of dropping an element of the adapter's input in training."""
    bias: str = "none"
    """Biases of the model that train too: "none", "all" or "delora_only"."""
    init_weights: bool = True
    """True: the adapter starts at zero; False: random, for tests."""
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    """{path suffix or regular expression: r}; the first that matches a layer's path applies."""
    lambda_pattern: dict[str, float] | None = field(default_factory=dict)
    """{path suffix or regular expression: λ at the start}."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r")
        self.probability("module_dropout")
        self.one_of("bias", self.bias, ("none", "all", "delora_only"))


@register("DELORA", DeloraConfig)
class Delora(Adapter):
    """DeLoRA at one layer."""

    dropout_option = "module_dropout"

    w_norm: Tensor

    def __init__(self, config: DeloraConfig, base: BaseWeight, path: str):
        super().__init__(config, base, path)
        r: Any = first_match(config.rank_pattern, path, config.r)
        self.start = float(first_match(config.lambda_pattern, path, config.delora_lambda))
        self.add_dropout()
        self.init = config.init_weights
        self.delora_A = nn.Parameter(torch.empty(r, base.in_features))
        self.delora_B = nn.Parameter(torch.empty(base.out_features, r))
        self.delora_lambda = nn.Parameter(torch.empty(1))
        self.register_buffer("w_norm", torch.empty(base.in_features))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        kaiming_uniform_(self.delora_A)
        if self.init:
            nn.init.zeros_(self.delora_B)
        else:
            kaiming_uniform_(self.delora_B)
        self.delora_lambda.fill_(self.start)
        self.w_norm.copy_(self.base.read_unmerged().to(self.w_norm).norm(dim=0))

    def _scales(self) -> Tensor:
        """Return the scales (r,) of the rank-one parts: λ/(r ‖A_k‖ ‖B_k‖), for row k of A and column k of B."""
        lengths = self.delora_A.norm(dim=1).clamp_min(SHORTEST) * self.delora_B.norm(dim=0).clamp_min(SHORTEST)
        return self.delora_lambda / (len(lengths) * lengths)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.base.apply(self.dropped(x), self.delora_A * self.w_norm)
        return self.base.add_pointwise(y, h.to(y.dtype), self.delora_B * self._scales())

    def delta_weight(self) -> Tensor:
        return (self.delora_B * self._scales()) @ (self.delora_A * self.w_norm)

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        return {**super().checkpoint_tensors(), "delora_w_norm": self.w_norm}

    @torch.no_grad()
    def load_checkpoint_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_checkpoint_tensors(tensors)
        self.w_norm.copy_(tensors["delora_w_norm"])
