"""HiRA: W' = W + W₀ ⊙ (BA), with W₀ the base's own weight: a change of high rank. openreview.net/forum?id=TwJrTz9cRS.

Shapes: i in_features, o out_features, r rank, g groups, k kernel; A (r, i/g, *k), B (o, r, *1). On an embedding of v
rows of size d: A (r, v), B (d, r), and A starts at zero instead of B.
Unlike PEFT it also scales its part on scaled embeddings, and takes convolutions with groups. PEFT ignores rank_pattern
in a layer's first adapter, so its tensors may have rank r where the pattern states another; both are read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight
from peftcore.config import TunerConfig, first_match
from peftcore.errors import ConfigError
from peftcore.kernels.start_values import kaiming_uniform_, normal_
from peftcore.registry import register


@dataclass
class HiraConfig(TunerConfig):
    """HiRA's options under PEFT's names."""

    r: int = 32
    """Rank of BA (count)."""
    hira_dropout: float = 0.0
    """Probability of dropping an element of the adapter's input in training; not on embeddings."""
    init_weights: bool | str | None = True
    """True: the adapter starts at zero; "gaussian": and A normal with deviation 1/r; False: random, for tests."""
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    """{path suffix or regular expression: r}; the first that matches a layer's path applies."""
    fan_in_fan_out: bool = False
    """Read and saved for PEFT; without effect, because the orientation is found per layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r")
        self.probability("hira_dropout")
        if self.init_weights not in (True, False, None, "gaussian"):
            raise ConfigError(f"HiraConfig: init_weights must be True, False or 'gaussian'; got {self.init_weights!r}")


@register("HIRA", HiraConfig)
class Hira(Adapter):
    """HiRA at one layer."""

    layer_kinds = frozenset({"linear", "conv", "embedding"})
    dropout_option = "hira_dropout"

    def __init__(self, config: HiraConfig, base: BaseWeight, path: str):
        super().__init__(config, base, path)
        self.default_rank, r = config.r, first_match(config.rank_pattern, path, config.r)
        if base.kind != "embedding":
            self.add_dropout()
        self.init = config.init_weights
        shape_A, shape_B = self._shapes(r)
        self.hira_A, self.hira_B = nn.Parameter(torch.empty(shape_A)), nn.Parameter(torch.empty(shape_B))

    def _shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B at rank r."""
        base = self.base
        groups = base.layer.groups if base.kind == "conv" else 1
        return (r, base.in_features // groups, *base.kernel), (base.out_features, r, *(1 for _ in base.kernel))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        normal_(self.hira_A)
        normal_(self.hira_B)
        if not self.init:
            return
        if self.base.kind == "embedding":
            nn.init.zeros_(self.hira_A)
            normal_(self.hira_B)
            return
        nn.init.zeros_(self.hira_B)
        if self.init == "gaussian" and self.base.kind == "linear":
            normal_(self.hira_A, std=1 / self.hira_A.shape[0])
        else:
            kaiming_uniform_(self.hira_A)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        if self.base.kind == "embedding":
            factor = F.linear(F.embedding(x, self.hira_A.T).to(y.dtype), self.hira_B.to(y.dtype))
            return y + self.base.apply(x, self.base.read_unmerged()).to(y.dtype) * factor
        return y + self.base.apply(self.dropped(x), self._delta(x.dtype)).to(y.dtype)

    def _delta(self, dtype: torch.dtype) -> Tensor:
        a, b = self.hira_A.to(dtype).flatten(1), self.hira_B.to(dtype).flatten(1)
        own = self.base.read_unmerged().to(dtype)
        return own * (b @ a).view(own.shape)

    def delta_weight(self) -> Tensor:
        return self._delta(self.hira_A.dtype)

    def checkpoint_keys(self) -> dict[str, str]:
        if self.base.kind == "embedding":
            return {"hira_A": "hira_embedding_A", "hira_B": "hira_embedding_B"}
        return {"hira_A": "hira_A", "hira_B": "hira_B"}

    def fits(self, key: str, tensor: Tensor) -> bool:
        return super().fits(key, tensor) or tensor.shape == self._shapes(self.default_rank)[key.endswith("B")]

    @torch.no_grad()
    def load_checkpoint_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        for name, key in self.checkpoint_keys().items():
            parameter = self.get_parameter(name)
            parameter.data = tensors[key].to(parameter, copy=True)
