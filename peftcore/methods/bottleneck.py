"""Bottleneck adapter: y' = y + s·(U σ(D z + d) + u), z = y after the layer or z = x beside it. arXiv:1902.00751.

Placements: Houlsby's after attention and MLP (arXiv:1902.00751), Pfeiffer's after the MLP (arXiv:2005.00052), both with
z = y, and the parallel one of He et al. with z = x and a factor s (arXiv:2110.04366).
Shapes: i in_features, o out_features, m bottleneck size; D (m, o), or (m, i) beside the layer; d (m,), U (o, m), u
(o,), s a number, (1,) or (o,).

HF PEFT has no such method, so only peftcore reads these directories. The adapter sees one layer, not the residual
stream or the norm around the layer. So it lacks the options of the library `adapters` that move the residual connection
or add norms (`residual_before_ln`, `ln_before`), PHM layers (Compacter) and gates.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight, is_adaptable
from peftcore.config import TunerConfig
from peftcore.detection import detect
from peftcore.detection.roles import Role
from peftcore.errors import ConfigError, MergeError, suggestion
from peftcore.kernels.start_values import kaiming_uniform_
from peftcore.registry import register

_STYLES: dict[str, tuple[tuple[Role, ...], float, str, float]] = {
    "houlsby": (("output", "down"), 16.0, "swish", 1.0),
    "pfeiffer": (("down",), 16.0, "relu", 1.0),
    "parallel": (("down",), 2.0, "relu", 4.0),
}
"""{style: (roles of its default targets, reduction_factor, non_linearity, scaling)}, the defaults of `adapters`."""


@dataclass
class BottleneckConfig(TunerConfig):
    """Options of bottleneck adapters, most under the names of the library `adapters`."""

    size_fields: ClassVar[tuple[str, ...]] = ("bottleneck_size",)

    style: str = "houlsby"
    """"houlsby" or "pfeiffer": after the layer, they differ in their defaults; "parallel": beside the layer.

    Without target_modules, houlsby adapts the last layers of attention and MLP, the others the last layers of MLPs."""
    reduction_factor: float | None = None
    """o / m; None: 16, for the parallel style 2."""
    bottleneck_size: int | None = None
    """m (count), in place of reduction_factor."""
    non_linearity: str | None = None
    """Activation σ, a name of `transformers.activations.ACT2FN`; None: "swish" for houlsby, "relu" for the others."""
    scaling: float | str | None = None
    """s: a number, "learned" (one trained number) or "channel" (one for each output); None: 1, for parallel 4."""
    dropout: float = 0.0
    """Probability of dropping an element of the adapter's output in training."""
    init_weights: bool = True
    """True: U and u start at zero, so the adapter changes nothing; False: U is random, for tests."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.one_of("style", self.style, _STYLES)
        _, factor, activation, scaling = _STYLES[self.style]
        if self.bottleneck_size is not None:
            self.positive("bottleneck_size")
            if self.reduction_factor is not None:
                raise ConfigError("BottleneckConfig: give reduction_factor or bottleneck_size, not both")
        elif self.reduction_factor is None:
            self.reduction_factor = factor
        elif self.reduction_factor < 1:
            raise ConfigError(
                f"BottleneckConfig: reduction_factor must be at least 1; got {self.reduction_factor}; for a wider "
                "adapter give bottleneck_size"
            )
        self.non_linearity = activation if self.non_linearity is None else self.non_linearity
        self.scaling = scaling if self.scaling is None else self.scaling
        self.probability("dropout")
        if self.non_linearity not in ACT2FN:
            hint = suggestion(self.non_linearity, ACT2FN)
            raise ConfigError(f"BottleneckConfig: unknown non_linearity {self.non_linearity!r}{hint}")
        if isinstance(self.scaling, str):
            self.one_of("scaling", self.scaling, ("learned", "channel"))


@register("BOTTLENECK", BottleneckConfig)
class Bottleneck(Adapter):
    """The bottleneck adapter of one layer."""

    dropout_option = "dropout"

    def __init__(self, config: BottleneckConfig, base: BaseWeight, path: str):
        super().__init__(config, base, path)
        assert config.non_linearity is not None
        self.starts_at_zero, self.is_parallel = config.init_weights, config.style == "parallel"
        self.activation = ACT2FN[config.non_linearity]
        o = base.out_features
        m = config.bottleneck_size or max(1, int(o // (config.reduction_factor or 1)))
        self.bottleneck_down = nn.Parameter(torch.empty(m, base.in_features if self.is_parallel else o))
        self.bottleneck_down_bias = nn.Parameter(torch.empty(m))
        self.bottleneck_up = nn.Parameter(torch.empty(o, m))
        self.bottleneck_up_bias = nn.Parameter(torch.empty(o))
        trained = {"learned": 1, "channel": o}.get(str(config.scaling))
        self.bottleneck_scaling = None if trained is None else nn.Parameter(torch.empty(trained))
        self.scaling = config.scaling if isinstance(config.scaling, float | int) else 1.0
        self.add_dropout()

    @classmethod
    def default_targets(
        cls, config: BottleneckConfig, model: nn.Module, layers: Mapping[str, nn.Module]
    ) -> list[str] | None:
        architecture = detect(model)
        names = architecture.targets(*_STYLES[config.style][0])
        regex = architecture.target_regex(names)
        return [path for path, layer in layers.items() if re.fullmatch(regex, path) and is_adaptable(layer)] or None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        kaiming_uniform_(self.bottleneck_down)
        nn.init.zeros_(self.bottleneck_down_bias)
        nn.init.zeros_(self.bottleneck_up) if self.starts_at_zero else kaiming_uniform_(self.bottleneck_up)
        nn.init.zeros_(self.bottleneck_up_bias)
        if self.bottleneck_scaling is not None:
            nn.init.ones_(self.bottleneck_scaling)

    @property
    def is_additive(self) -> bool:
        return self.is_parallel

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        z = x if self.is_parallel else y
        h = self.activation(F.linear(z, self.bottleneck_down.to(z.dtype), self.bottleneck_down_bias.to(z.dtype)))
        change = F.linear(h, self.bottleneck_up.to(h.dtype), self.bottleneck_up_bias.to(h.dtype))
        factor = self.scaling if self.bottleneck_scaling is None else self.bottleneck_scaling.to(change.dtype)
        return y + self.dropped(factor * change).to(y.dtype)

    def check_mergeable(self) -> None:
        raise MergeError("a bottleneck adapter is not linear, so no weight equals it; keep it unmerged")
