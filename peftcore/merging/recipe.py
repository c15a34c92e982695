"""`Recipe`: how changes of weights become one. Sparsify, weigh, elect a sign, normalise, times λ.

With τᵢ = sparsify(Δᵢ) of one layer and weights wᵢ, each element is

    λ · Σᵢ wᵢτᵢ·1[sign(wᵢτᵢ) = elected] / n,    elected = sign Σᵢ wᵢτᵢ,    n = Σᵢ |wᵢ|·1[...], Σᵢ wᵢ or 1,

and without an election every element counts. Task arithmetic: arXiv:2212.04089. TIES: arXiv:2306.01708. DARE:
arXiv:2311.03099. DELLA: arXiv:2406.11617. Breadcrumbs: arXiv:2312.06795. Model stock: arXiv:2403.19522.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from peftcore.errors import ConfigError

Sparsify = Literal["magnitude", "random", "row_rank", "outliers"]
Weigh = Literal["given", "slerp", "stock"]
Elect = Literal["sum", "count"]
Normalise = Literal["weights", "agreeing", "count"]


@dataclass(frozen=True)
class Recipe:
    """One way to combine; the class methods are the named ones. ConfigError for values that cannot be."""

    sparsify: Sparsify | None = None
    """What is dropped of each change, see `peftcore.merging.sparsify`; None: nothing."""
    density: float = 1.0
    """Share of a layer's elements that is kept, in (0, 1]."""
    epsilon: float = 0.0
    """DELLA: how far an element's chance of being kept is from `density` at most."""
    gamma: float = 0.0
    """Breadcrumbs: share of the largest elements that is dropped."""
    weigh: Weigh = "given"
    """Where a layer's weights come from: as they are given, or from the angles between the changes."""
    elect: Elect | None = None
    """Whose sign wins at an element: that of the sum, or of most changes; + where neither. None: no election."""
    elect_weighted: bool = True
    """Whether changes are weighted before the election too (HF PEFT does so only after it)."""
    normalise: Normalise | None = None
    """Divide by the sum of the weights, by that of those whose sign was elected, or by how many these are."""
    scale: float = 1.0
    """λ."""
    seed: int | None = 0
    """Where chance begins; None: PyTorch's own generator as it stands."""

    def __post_init__(self) -> None:
        for name, fits in (("sparsify", Sparsify), ("weigh", Weigh), ("elect", Elect), ("normalise", Normalise)):
            value, known = getattr(self, name), get_args(fits)
            if value not in known and (value is not None or name == "weigh"):
                raise ConfigError(f"Recipe: {name} must be one of {', '.join(known)}; got {value!r}")
        check_density("Recipe: density", self.density)
        if not math.isfinite(self.scale):
            raise ConfigError(f"Recipe: scale must be a finite number; got {self.scale!r}; try 1")
        if self.epsilon < 0 or (self.epsilon and not self.epsilon < self.density <= 1 - self.epsilon):
            raise ConfigError(
                f"Recipe: density - epsilon must be above 0 and density + epsilon at most 1; got {self.density} and "
                f"{self.epsilon}; try epsilon={min(self.density / 2, 1 - self.density):.3g}"
            )
        if not 0 <= self.gamma <= 1 - self.density + 1e-9:
            raise ConfigError(
                f"Recipe: gamma must be from 0 to 1 - density = {1 - self.density:.3g}, or fewer elements are left "
                f"than density asks for; got {self.gamma!r}"
            )
        if self.normalise in ("agreeing", "count") and self.elect is None:
            raise ConfigError(f"Recipe: normalise={self.normalise!r} counts elected signs; give elect='sum' too")
        if self.weigh != "given" and (self.needs_dense or self.normalise):
            raise ConfigError(f"Recipe: weigh={self.weigh!r} makes its own weights of whole changes; give scale only")

    @property
    def needs_dense(self) -> bool:
        """Whether single elements of ΔW are looked at; else low-rank factors are enough."""
        return self.sparsify is not None or self.elect is not None

    def check_weights(self, weights: Sequence[float]) -> None:
        """Raise ConfigError for weights that this recipe cannot take."""
        if not weights:
            raise ConfigError("no adapters to combine; give at least one, such as {'default': 1.0}")
        if bad := [w for w in weights if isinstance(w, bool) or not isinstance(w, int | float) or not math.isfinite(w)]:
            raise ConfigError(f"weights must be finite numbers; got {bad[0]!r}; try 1.0")
        if self.weigh == "slerp" and (len(weights) != 2 or min(weights) < 0 or not sum(weights)):
            raise ConfigError(
                f"SLERP goes from one adapter to another: two weights of at least 0, such as 0.7 and 0.3; got "
                f"{list(weights)}"
            )
        if self.weigh == "stock" and (len(weights) < 2 or len(set(weights)) > 1):
            raise ConfigError(
                "model stock finds its own weights for two adapters or more, so each is given the same, such as 1; got "
                f"{list(weights)}"
            )
        if self.normalise == "weights" and (min(weights) < 0 or not sum(weights)):
            raise ConfigError(
                f"an average needs weights of at least 0, and one above it; got {list(weights)}; to take an adapter "
                "away, use Recipe.task_arithmetic()"
            )

    # -- named -------------------------------------------------------------------------------------------------

    @classmethod
    def task_arithmetic(cls, scale: float = 1.0) -> "Recipe":
        """λ Σ wΔ; negative weights take an adapter's change away."""
        return cls(scale=scale)

    @classmethod
    def linear(cls) -> "Recipe":
        """The average Σ wΔ / Σ w."""
        return cls(normalise="weights")

    @classmethod
    def slerp(cls) -> "Recipe":
        """(sin((1−t)θ)Δ₁ + sin(tθ)Δ₂)/sin θ layer by layer, θ the angle between the two, t = w₂/(w₁ + w₂)."""
        return cls(weigh="slerp")

    @classmethod
    def model_stock(cls) -> "Recipe":
        """t·mean Δ layer by layer, t = Nc/(1 + (N−1)c), c the mean cosine between two of the N changes."""
        return cls(weigh="stock")

    @classmethod
    def magnitude_prune(cls, density: float, scale: float = 1.0) -> "Recipe":
        """λ Σ wτ, τ the largest elements of a layer's Δ."""
        return cls("magnitude", density, scale=scale)

    @classmethod
    def ties(cls, density: float = 0.2, scale: float = 1.0) -> "Recipe":
        """The largest elements of each Δ, and of these the average of those that have the elected sign."""
        return cls("magnitude", density, elect="sum", normalise="agreeing", scale=scale)

    @classmethod
    def dare_linear(cls, density: float, scale: float = 1.0, seed: int = 0) -> "Recipe":
        """λ Σ wτ, τ a random share of Δ's elements, divided by that share."""
        return cls("random", density, scale=scale, seed=seed)

    @classmethod
    def dare_ties(cls, density: float, scale: float = 1.0, seed: int = 0) -> "Recipe":
        """DARE's random share, then the election and the average of TIES."""
        return cls("random", density, elect="sum", normalise="agreeing", scale=scale, seed=seed)

    @classmethod
    def della(cls, density: float, epsilon: float, scale: float = 1.0, seed: int = 0) -> "Recipe":
        """As DARE-TIES, but large elements of a row are likelier to be kept than small ones, by ± ε."""
        return cls("row_rank", density, epsilon, elect="sum", normalise="agreeing", scale=scale, seed=seed)

    @classmethod
    def breadcrumbs(cls, density: float = 0.9, gamma: float = 0.01, scale: float = 1.0) -> "Recipe":
        """λ Σ wτ, τ without the share γ of largest elements and the share 1 − density − γ of smallest ones."""
        return cls("outliers", density, gamma=gamma, scale=scale)


def check_density(what: str, density: float | None) -> None:
    """Raise ConfigError unless it is in (0, 1]."""
    if not isinstance(density, int | float) or isinstance(density, bool) or not 0 < density <= 1:
        raise ConfigError(
            f"{what} must be above 0 and at most 1, the share of elements to keep; got {density!r}; try 0.2"
        )
