"""`Recipe`: how several weight changes become one: sparsify, weigh, elect a sign, normalise, scale by λ.

With τᵢ = sparsify(Δᵢ) at one layer and weights wᵢ, each element of the merged change is

    λ · Σᵢ wᵢτᵢ·1[sign(wᵢτᵢ) = elected] / n,    elected = sign Σᵢ wᵢτᵢ,    n = Σᵢ |wᵢ|·1[...], Σᵢ wᵢ or 1.

Without an election every element counts. Task arithmetic: arXiv:2212.04089. TIES: arXiv:2306.01708. DARE:
arXiv:2311.03099. DELLA: arXiv:2406.11617. Breadcrumbs: arXiv:2312.06795. Model stock: arXiv:2403.19522.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from peftcore.errors import ConfigError, OptionTypeError

Sparsify = Literal["magnitude", "random", "row_rank", "outliers"]
Weigh = Literal["given", "slerp", "stock"]
Elect = Literal["sum", "count"]
Normalise = Literal["weights", "agreeing", "count"]


@dataclass(frozen=True)
class Recipe:
    """A merging recipe; the class methods make the published ones, such as `Recipe.ties()`.

    Raises:
        ConfigError: a value is not valid, or two fields exclude each other.
    """

    sparsify: Sparsify | None = None
    """Rule by which elements of each change are dropped (see `peftcore.merging.sparsify`); None keeps all."""
    density: float = 1.0
    """Share of a layer's elements to keep, in (0, 1]."""
    epsilon: float = 0.0
    """DELLA: largest distance of an element's probability of being kept from `density`."""
    gamma: float = 0.0
    """Breadcrumbs: share of the largest elements to drop."""
    weigh: Weigh = "given"
    """Source of a layer's weights: the caller ("given"), or the angles between the changes ("slerp", "stock")."""
    elect: Elect | None = None
    """Elected sign of an element: that of the sum, or of the majority ("count"); a tie is +. None: no election."""
    elect_weighted: bool = True
    """True: weights apply before the election. False: only after it, as in HF PEFT."""
    normalise: Normalise | None = None
    """Divisor: sum of all weights, sum of the agreeing changes' weights, or number of agreeing changes ("count")."""
    scale: float = 1.0
    """λ."""
    seed: int | None = 0
    """Seed of random recipes; None: PyTorch's default generator."""

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
            raise ConfigError(
                f"Recipe: weigh={self.weigh!r} computes its own weights of whole changes; give scale only"
            )

    @property
    def needs_dense(self) -> bool:
        """True if the recipe looks at single elements of ΔW; otherwise low-rank factors are enough."""
        return self.sparsify is not None or self.elect is not None

    def check_weights(self, weights: Sequence[float]) -> None:
        """Raise ConfigError for weights that are not valid for this recipe."""
        if not weights:
            raise ConfigError("no adapters to merge; give at least one, such as {'default': 1.0}")
        if bad := [w for w in weights if isinstance(w, bool) or not isinstance(w, int | float) or not math.isfinite(w)]:
            raise ConfigError(f"weights must be finite numbers; got {bad[0]!r}; try 1.0")
        if self.weigh == "slerp" and (len(weights) != 2 or min(weights) < 0 or not sum(weights)):
            raise ConfigError(
                f"SLERP interpolates between two adapters: give two weights of at least 0, such as 0.7 and 0.3; got "
                f"{list(weights)}"
            )
        if self.weigh == "stock" and (len(weights) < 2 or len(set(weights)) > 1):
            raise ConfigError(
                "model stock computes its own weights for two or more adapters; give each the same weight, such as 1; "
                f"got {list(weights)}"
            )
        if self.normalise == "weights" and (min(weights) < 0 or not sum(weights)):
            raise ConfigError(
                f"an average needs weights of at least 0, and one above 0; got {list(weights)}; to subtract an "
                "adapter, use Recipe.task_arithmetic()"
            )

    # -- published recipes -------------------------------------------------------------------------------------

    @classmethod
    def task_arithmetic(cls, scale: float = 1.0) -> "Recipe":
        """Return task arithmetic: λ Σ wΔ. A negative weight subtracts an adapter's change."""
        return cls(scale=scale)

    @classmethod
    def linear(cls) -> "Recipe":
        """Return the weighted average, as a recipe: Σ wΔ / Σ w."""
        return cls(normalise="weights")

    @classmethod
    def slerp(cls) -> "Recipe":
        """Return spherical interpolation, layer by layer: (sin((1−t)θ)Δ₁ + sin(tθ)Δ₂)/sin θ.

        θ is the angle between Δ₁ and Δ₂, and t = w₂/(w₁ + w₂).
        """
        return cls(weigh="slerp")

    @classmethod
    def model_stock(cls) -> "Recipe":
        """Return model stock, layer by layer: t times the mean of the N changes.

        t = Nc/(1 + (N−1)c), and c is the mean cosine over all pairs of changes.
        """
        return cls(weigh="stock")

    @classmethod
    def magnitude_prune(cls, density: float, scale: float = 1.0) -> "Recipe":
        """Return magnitude pruning: λ Σ wτ, where τ keeps the largest elements of a layer's Δ."""
        return cls("magnitude", density, scale=scale)

    @classmethod
    def ties(cls, density: float = 0.2, scale: float = 1.0) -> "Recipe":
        """Return TIES: the average of the largest elements of each Δ, of those with the elected sign."""
        return cls("magnitude", density, elect="sum", normalise="agreeing", scale=scale)

    @classmethod
    def dare_linear(cls, density: float, scale: float = 1.0, seed: int = 0) -> "Recipe":
        """Return DARE: λ Σ wτ, where τ keeps a random share of Δ's elements, divided by that share."""
        return cls("random", density, scale=scale, seed=seed)

    @classmethod
    def dare_ties(cls, density: float, scale: float = 1.0, seed: int = 0) -> "Recipe":
        """Return DARE-TIES: the average of TIES over changes that DARE sparsified."""
        return cls("random", density, elect="sum", normalise="agreeing", scale=scale, seed=seed)

    @classmethod
    def della(cls, density: float, epsilon: float, scale: float = 1.0, seed: int = 0) -> "Recipe":
        """Return DELLA: DARE-TIES that keeps an element with probability density ± ε, more often if it is large."""
        return cls("row_rank", density, epsilon, elect="sum", normalise="agreeing", scale=scale, seed=seed)

    @classmethod
    def breadcrumbs(cls, density: float = 0.9, gamma: float = 0.01, scale: float = 1.0) -> "Recipe":
        """Return breadcrumbs: λ Σ wτ, where τ drops the share γ of largest and 1 − density − γ of smallest elements."""
        return cls("outliers", density, gamma=gamma, scale=scale)


def check_density(option: str, density: float | None) -> None:
    """Raise ConfigError unless the density is in (0, 1]; `option` names it in the message."""
    message = f"{option} must be above 0 and at most 1, the share of elements to keep; got {density!r}; try 0.2"
    if not isinstance(density, int | float) or isinstance(density, bool):
        raise OptionTypeError(message)
    if not 0 < density <= 1:
        raise ConfigError(message)
