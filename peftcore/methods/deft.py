"""DEFT: W' = (I − Q Sᵀ) W₀ + s·Q R, where Q Sᵀ projects out a subspace of outputs and Q R refills it. arXiv:2509.22793.

"relu": Q = P, S = relu(P). "qr": Q = S, an orthonormal basis of P's columns. `para=True` leaves out Q R, as in PaRa.
All adapters of a layer read W₀, the base's own weight, so their changes ΔW = Q (s·R − Sᵀ W₀) add up.

Shapes: i in_features, o out_features, r rank, at most o; P, Q, S (o, r), R (r, i); s = alpha / r, or 1 without alpha.
PEFT computes a layer's change in float32; here it has the activations' type, and the start on float64 bases is exact.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight
from peftcore.config import TunerConfig
from peftcore.kernels.factors import Factors
from peftcore.kernels.start_values import normal_
from peftcore.registry import register


@dataclass
class DeftConfig(TunerConfig):
    """DEFT's options under PEFT's names."""

    r: int = 8
    """Rank (count): dimensions of the subspace; a layer with fewer outputs has fewer."""
    decomposition_method: str = "relu"
    """"relu": the projector is P relu(P)ᵀ; "qr": the orthogonal projector on P's columns."""
    init_scale: float = 1.0
    """Factor of the standard deviation 0.02 of R's random start values, with init_weights=False."""
    alpha: int | None = None
    """Q R is scaled by alpha / r; None: not scaled."""
    para: bool = False
    """True removes the subspace without refilling it; the adapter then does not start at the base's output."""
    fan_in_fan_out: bool = False
    """Read and saved for PEFT; without effect, because the orientation is found per layer."""
    deft_dropout: float = 0.0
    """Probability of dropping an element of R's input in training."""
    init_weights: bool = True
    """True: R starts where the adapter changes nothing; False: R is random."""
    bias: str = "none"
    """Biases of the model that train too: "none", "all" or "deft_only"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r")
        self.probability("deft_dropout")
        self.one_of("decomposition_method", self.decomposition_method, ("relu", "qr"))
        self.one_of("bias", self.bias, ("none", "all", "deft_only"))

    def without_effect(self) -> dict[str, str]:
        """Return the options that concern R alone, if there is no R."""
        values = {"alpha": self.alpha, "deft_dropout": self.deft_dropout}
        return {name: "para=False" for name, value in values.items() if value and self.para}


@register("DEFT", DeftConfig)
class Deft(Adapter):
    """DEFT at one layer."""

    dropout_option = "deft_dropout"

    def __init__(self, config: DeftConfig, base: BaseWeight, path: str):
        super().__init__(config, base, path)
        self.config, r = config, min(config.r, base.out_features)
        self.add_dropout()
        self.deft_scaling = config.alpha / r if config.alpha else 1.0
        self.deft_P = nn.Parameter(torch.empty(base.out_features, r))
        self.deft_R = None if config.para else nn.Parameter(torch.empty(r, base.in_features))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        normal_(self.deft_P, std=0.02)
        if self.deft_R is None:
            return
        if self.config.init_weights:
            self.deft_R.copy_(self._removed(self._sides()[1]) / self.deft_scaling)
        else:
            normal_(self.deft_R, std=0.02 * self.config.init_scale)

    def prepare_to_read(self) -> None:
        """Do nothing: a directory has P and R."""

    def _sides(self) -> tuple[Tensor, Tensor]:
        """Return Q and S (o, r)."""
        if self.config.decomposition_method == "relu":
            return self.deft_P, self.deft_P.relu()
        q = torch.linalg.qr(self.deft_P.float() if self.deft_P.itemsize < 4 else self.deft_P).Q
        return q, q

    def _removed(self, side: Tensor) -> Tensor:
        """Return Sᵀ W₀ (r, i) in the type of S."""
        return side.T @ self.base.read_unmerged().to(side)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        q, side = self._sides()
        h = -self.base.apply(x, self._removed(side.to(y.dtype)))
        if self.deft_R is not None:
            h = h + self.base.apply(self.dropped(x), self.deft_R * self.deft_scaling)
        return self.base.add_pointwise(y, h.to(y.dtype), q)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Return s·R − Sᵀ W₀ (r, i) and Q (o, r), whose product is ΔW."""
        q, side = self._sides()
        removed = self._removed(side)
        return -removed if self.deft_R is None else self.deft_R * self.deft_scaling - removed, q

    def exact_factors(self) -> Factors:
        down, up = self._factors()
        return Factors(down[None], up[None])
