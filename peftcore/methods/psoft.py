"""PSOFT: ΔW = s·B (diag(b) R diag(a) − I) A, R orthogonal, W ≈ s·BA by its SVD. openreview.net/forum?id=FSHrinMArK.

R = (I + Q)(I − Q)⁻¹ is the Cayley transform of a skew-symmetric Q. It turns the part of W in its principal subspace.

Shapes: i in_features, o out_features, r rank, s = psoft_alpha / r; W ≈ U Σ Vᵀ, U (o, r), Σ (r, r), V (i, r). A = Vᵀ and
B = UΣ/s, with "pissa_init" A = √(Σ/s) Vᵀ and B = U√(Σ/s). psoft_R (r(r−1)/2,) is Q above its diagonal; without
`psoft_orth` it is R itself (r, r).
A and B are not saved: loading computes them again, so the base must be the one of the training.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight
from peftcore.config import TunerConfig
from peftcore.errors import ConfigError
from peftcore.kernels.factors import Factors
from peftcore.kernels.maths import cayley, neumann, widened
from peftcore.registry import register

_LOW_RANK, _SERIES = "psoft_svd='lowrank'", "use_cayley_neumann=True"
_NEEDED = {
    "psoft_svd_lowrank_niter": _LOW_RANK,
    "random_seed": _LOW_RANK,
    "num_cayley_neumann_terms": _SERIES,
    "cayley_neumann_eps": _SERIES,
}
"""{option: the setting without which it has no effect}"""


@dataclass
class PsoftConfig(TunerConfig):
    """PSOFT's options under PEFT's names."""

    r: int = 32
    """Rank (count): dimension of the principal subspace."""
    psoft_alpha: int = 32
    """Scaling of the change: s = psoft_alpha / r; A and B are divided by s, so s alone changes nothing."""
    psoft_dropout: float = 0.0
    """Probability of dropping an element of the adapter's input in training."""
    ab_svd_init: str = "psoft_init"
    """"psoft_init": the singular values are in B; "pissa_init": their roots are in A and in B."""
    psoft_svd: str = "full"
    """"full" or "lowrank", a faster and random approximation of the singular vectors."""
    psoft_svd_lowrank_niter: int = 10
    """Iterations of the approximation (count), for psoft_svd="lowrank"."""
    random_seed: int = 0
    """Seed of the approximation, for psoft_svd="lowrank"."""
    psoft_orth: bool = True
    """Keep R orthogonal; False: all elements of R train."""
    psoft_mag_b: bool = True
    """Train the vector b, which scales the output of R."""
    psoft_mag_a: bool = True
    """Train the vector a, which scales the input of R."""
    use_cayley_neumann: bool = False
    """Use a power series for the inverse: cheaper, and orthogonal only while Q is small."""
    num_cayley_neumann_terms: int = 5
    """Powers of Q in the series, the identity included (count)."""
    cayley_neumann_eps: float | None = None
    """Bound of ‖Q‖ in the series, below 1; None: no bound."""
    init_weights: bool = True
    """True: R starts at the identity; False: random, for tests."""
    fan_in_fan_out: bool = False
    """Read and saved for PEFT; without effect, because the orientation is found per layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r", "psoft_alpha", "psoft_svd_lowrank_niter")
        self.probability("psoft_dropout")
        self.one_of("ab_svd_init", self.ab_svd_init, ("psoft_init", "pissa_init"))
        self.one_of("psoft_svd", self.psoft_svd, ("full", "lowrank"))
        if self.use_cayley_neumann and self.num_cayley_neumann_terms < 2:
            raise ConfigError(
                "PsoftConfig: num_cayley_neumann_terms must be at least 2, since with fewer nothing turns; "
                f"got {self.num_cayley_neumann_terms}; try 5"
            )
        if self.use_cayley_neumann and self.cayley_neumann_eps is not None and not 0 < self.cayley_neumann_eps < 1:
            raise ConfigError(
                f"PsoftConfig: cayley_neumann_eps must be between 0 and 1; got {self.cayley_neumann_eps}; try 0.9"
            )
        is_set = {_LOW_RANK: self.psoft_svd == "lowrank", _SERIES: self.use_cayley_neumann}
        for name, setting in _NEEDED.items():
            if not is_set[setting] and getattr(self, name) != getattr(type(self), name):  # the default
                warnings.warn(f"PsoftConfig: {name} has no effect without {setting}", stacklevel=3)


class Turn(nn.Module):
    """The parameters of diag(b) R diag(a)."""

    def __init__(self, config: PsoftConfig):
        super().__init__()
        r = config.r
        self.weight = nn.Parameter(torch.empty(r * (r - 1) // 2 if config.psoft_orth else (r, r)))
        self.vector_b = nn.Parameter(torch.empty(r)) if config.psoft_mag_b else None
        self.vector_a = nn.Parameter(torch.empty(r)) if config.psoft_mag_a else None


@register("PSOFT", PsoftConfig)
class Psoft(Adapter):
    """PSOFT at one layer."""

    dropout_option = "psoft_dropout"
    unrounded = frozenset({"psoft_A", "psoft_B"})

    psoft_A: Tensor
    psoft_B: Tensor
    upper: Tensor

    def __init__(self, config: PsoftConfig, base: BaseWeight, path: str):
        super().__init__(config, base, path)
        r, smaller = config.r, min(base.in_features, base.out_features)
        if r > smaller:
            raise ConfigError(
                f"PSOFT: r must be at most the {smaller} singular values of {path}, got {r}; try {smaller}"
            )
        self.config = config
        self.scaling = config.psoft_alpha / r
        self.add_dropout()
        self.psoft_R = Turn(config)
        self.register_buffer("psoft_A", torch.empty(r, base.in_features))
        self.register_buffer("psoft_B", torch.empty(base.out_features, r))
        self.make_constants()

    def make_constants(self) -> None:
        r = self.config.r
        rows, columns = torch.triu_indices(r, r, 1, device=self.psoft_A.device)
        self.register_buffer("upper", rows * r + columns, persistent=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        turn, orthogonal = self.psoft_R, self.config.psoft_orth
        start = turn.weight.zero_() if orthogonal else nn.init.eye_(turn.weight)
        if not self.config.init_weights:  # PEFT draws in the base's type, on its device
            noise = torch.empty_like(start, dtype=self.base.dtype, device=self.base.device)
            start.add_(noise.normal_(std=0.1) if orthogonal else noise.normal_() * 0.1)
        for vector in (turn.vector_a, turn.vector_b):
            if vector is not None:
                nn.init.ones_(vector)
        self.prepare_to_read()

    @torch.no_grad()
    def prepare_to_read(self) -> None:
        """Compute A and B from the base's weight."""
        u, values, vh = self._singular_vectors(widened(self.base.read_unmerged()))
        values = values / self.scaling
        if self.config.ab_svd_init == "pissa_init":
            values = values.sqrt()
            vh = values[:, None] * vh
        self.psoft_A.copy_(vh)
        self.psoft_B.copy_(u * values)

    def _singular_vectors(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return U (o, r), the singular values (r,) and Vᵀ (r, i)."""
        config = self.config
        if config.psoft_svd == "full":
            u, values, vh = torch.linalg.svd(weight, full_matrices=False)
            return u[:, : config.r], values[: config.r], vh[: config.r]
        device = weight.device
        devices = [] if device.type in ("cpu", "meta") else [device]
        with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
            torch.manual_seed(config.random_seed)
            u, values, v = torch.svd_lowrank(weight, q=config.r, niter=config.psoft_svd_lowrank_niter)
        return u, values, v.T

    def _rotation(self) -> Tensor:
        """Return R (r, r), in float32 or float64 even under autocast."""
        config, weight = self.config, widened(self.psoft_R.weight)
        if not config.psoft_orth:
            return weight
        with torch.autocast(weight.device.type, enabled=False):
            upper = weight.new_zeros(config.r**2).scatter(0, self.upper, weight).view(config.r, config.r)
            skew = upper - upper.T
            if not config.use_cayley_neumann:
                return cayley(-skew)
            if config.cayley_neumann_eps is not None:
                skew = skew * (config.cayley_neumann_eps / skew.norm().clamp(min=config.cayley_neumann_eps))
            return neumann(skew, config.num_cayley_neumann_terms)

    def _turn(self) -> Tensor:
        """Return s (diag(b) R diag(a) − I) (r, r), in float32 or float64."""
        rotation, turn = self._rotation(), self.psoft_R
        if turn.vector_b is not None:
            rotation = turn.vector_b[:, None].to(rotation) * rotation
        if turn.vector_a is not None:
            rotation = rotation * turn.vector_a.to(rotation)
        return self.scaling * (rotation - torch.eye(len(rotation), dtype=rotation.dtype, device=rotation.device))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.base.apply(self.dropped(x), self.psoft_A)
        return self.base.add_pointwise(y, F.linear(h, self._turn().to(h.dtype)).to(y.dtype), self.psoft_B)

    def exact_factors(self) -> Factors:
        return Factors(self.psoft_A[None], (self.psoft_B @ self._turn().to(self.psoft_B))[None])
