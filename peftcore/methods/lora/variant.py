"""Variants of LoRA: each is one class, in one file of `peftcore.methods.lora.variants` or of another package.

A field of the configuration chooses a variant (`use_dora=True`, `init_lora_weights="pissa"`). The adapter of every
layer calls the hooks of the chosen variants in order; plain LoRA has none, so its forward pass calls nothing. A variant
is stateless: its parameters belong to the adapter, which every hook receives.

A variant of another package declares its field in a subclass of `LoraConfig` (`Variant.config`). The package names the
variant's module in an entry point of the group `peftcore.lora_variants`.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Tensor

from peftcore._util.plugins import import_plugins
from peftcore.adapter import Shared
from peftcore.bases import BaseWeight
from peftcore.config import PeftConfig
from peftcore.kernels.factors import Factors
from peftcore.kernels.low_rank import LowRankBranch

if TYPE_CHECKING:
    from peftcore.methods.lora.adapter import Lora
    from peftcore.methods.lora.config import LoraConfig
    from peftcore.methods.lora.options import Options

ENTRY_POINTS = "peftcore.lora_variants"


class Variant:
    """One change of plain LoRA. Shapes: i in_features, o out_features, r rank, x (..., i), y (..., o)."""

    option: ClassVar[str]
    """Field of the configuration that chooses the variant."""
    config: ClassVar["type[LoraConfig] | None"] = None
    """Configuration class that declares `option`; None: `LoraConfig` itself."""
    layer_kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    """Kinds of base layer that the variant fits; see `Adapter.layer_kinds`."""
    excludes: ClassVar[Mapping[str, str]] = {}
    """{field that cannot be set together with `option`: reason}."""
    stands_alone: ClassVar[bool] = False
    """True if a configuration can choose only one of the variants with this mark."""
    packs_factors: ClassVar[bool] = False
    """True if A or B trains and is saved in another shape than A (r, i) and B (o, r)."""
    options_class: ClassVar["type[Options] | None"] = None
    """Class of the option's value, for an option that holds several; a plain dictionary is converted to it."""
    keys: ClassVar[Mapping[str, str]] = {}
    """{parameter that the variant adds to the adapter: its suffix on disk}."""
    frozen: ClassVar[frozenset[str]] = frozenset()
    """Parameters of the adapter that are saved and never train."""
    changes_layers: ClassVar[bool] = True
    """False: only the hooks for the configuration are used, so the layers do not keep the variant."""
    replaces_base: ClassVar[bool] = False
    """True if the base weight is replaced by `Lora.new_base`."""
    is_gain: ClassVar[bool] = False
    """True if the variant only multiplies the adapted output by `output_gain`."""
    sees_others: ClassVar[bool] = False
    """True if `Adapter.beside` must hold the adapters of the layer."""
    is_additive: ClassVar[bool] = True
    """True if the adapter still computes y + f(x), with f independent of the arguments of the model's call."""
    refused_generate_options: ClassVar[Mapping[str, str]] = {}
    """{option of `generate` that may not be set while the adapter is active: reason}."""
    beyond_low_rank: ClassVar[str] = ""
    """Reason why two factors per layer cannot express the adapter, for export errors; "" if they can."""

    # -- hooks for the configuration -------------------------------------------------------------------------

    def is_chosen(self, config: "LoraConfig") -> bool:
        """Return True if the configuration asks for this variant."""
        return bool(getattr(config, self.option, None))

    def check(self, config: "LoraConfig") -> None:
        """Raise ConfigError for option values that do not fit; called when the configuration is created."""

    restricts_others: ClassVar[bool] = False
    """True if `check_beside` refuses some other adapters."""

    def check_beside(self, config: "LoraConfig", other: PeftConfig) -> None:
        """Raise ConfigError if a model cannot have adapters of these two configurations at the same time.

        Called only if `restricts_others`.
        """

    def denominator(self, r: int, denominator: float) -> float:
        """Return d of the scaling s = α/d for rank r; `denominator` is the value so far, r in plain LoRA."""
        return denominator

    def link(self, config: "LoraConfig", adapters: "Mapping[str, Lora]") -> None:
        """Share parameters between the layers of one adapter; `adapters` are by path."""

    def make_shared(self, config: "LoraConfig", bases: Mapping[str, BaseWeight]) -> Shared | None:
        """Return the state that all layers of one adapter share; see `Adapter.make_shared`."""
        return None

    def forward_arguments(self, config: "LoraConfig") -> frozenset[str] | None:
        """Return further arguments of the model's call; None if `before_forward` need not be called."""
        return None

    def before_forward(self, config: "LoraConfig", shared: Any, inputs: dict[str, Any]) -> None:
        """Read the arguments of the model's call before each forward pass; see `Adapter.before_forward`."""

    def regularizer(self, config: "LoraConfig", adapters: "Mapping[str, Lora]") -> Tensor | None:
        """Return a scalar to add to the loss of each step; None without one. `adapters` are by path."""
        return None

    # -- hooks for one layer ---------------------------------------------------------------------------------

    def check_layer(self, lora: "Lora", path: str) -> None:
        """Raise ConfigError if the variant does not fit the layer at `path`."""

    def add_parameters(self, lora: "Lora") -> None:
        """Register the parameters of `keys` on the adapter."""

    def reset_parameters(self, lora: "Lora") -> None:
        """Set the start values of the variant's parameters; A and B are set already."""

    def prepare_to_read(self, lora: "Lora") -> None:
        """Set what a saved adapter does not hold, in place of `reset_parameters`."""

    def computed_factors(self, lora: "Lora", a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return the A (r, i) and B (o, r) with which the layer computes, given the trained and saved tensors."""
        return a, b

    def change(self, lora: "Lora", x: Tensor) -> Tensor | None:
        """Return what replaces the whole change s·B(A x) (..., o) of the output; None for the change itself."""
        return None

    def product(self, lora: "Lora", x: Tensor, a: Tensor) -> Tensor | None:
        """Return what replaces the product A x (..., r) in the forward pass; None for the product itself."""
        return None

    def hidden(self, lora: "Lora", h: Tensor) -> Tensor:
        """Return what replaces h = A x (..., r) in the forward pass."""
        return h

    def output(self, lora: "Lora", y: Tensor, x: Tensor, dropped: Tensor, h: Tensor) -> Tensor:
        """Return what replaces the adapted output y.

        Args:
            lora: The adapter of this layer.
            y: The base's output plus the low-rank change.
            x: The layer's input.
            dropped: The input after dropout; `x` itself without dropout.
            h: s·A x (..., r), of the dropped input.
        """
        return y

    def low_rank(self, lora: "Lora", branch: LowRankBranch) -> LowRankBranch | None:
        """Return the forward pass in the form of the fused kernel; None if the kernel cannot compute the variant."""
        return None

    def output_gain(self, lora: "Lora") -> Tensor | None:
        """Return g (o,) of an `is_gain` variant, without gradients; None if that does not describe the forward pass."""
        return None

    def check_mergeable(self, lora: "Lora") -> None:
        """Raise MergeError if no fixed weight equals the adapter."""

    def exact_factors(self, lora: "Lora", factors: Factors) -> Factors | None:
        """Return the factors that ΔW equals exactly; None if ΔW is not a product of two."""
        return factors

    def merged_weight(self, lora: "Lora", weight: Tensor) -> Tensor:
        """Return what replaces the merged weight W + s·BA."""
        return weight

    def merged_bias(self, lora: "Lora", bias: Tensor | None) -> Tensor | None:
        """Return the bias (o,) after a merge, given the bias so far; MergeError if a layer without bias needs one."""
        return bias

    def bias_change(self, lora: "Lora") -> Tensor | None:
        """Return Δb (o,) of the layer's bias; None if the variant does not change a bias."""
        return None

    def checkpoint_tensors(self, lora: "Lora") -> dict[str, Tensor]:
        """Return {suffix on disk: tensor} of the parameters of `keys`."""
        return {key: lora.get_parameter(name).detach() for name, key in self.keys.items()}


_variants: list[Variant] = []

Kind = TypeVar("Kind", bound=Variant)


def register_variant(kind: type[Kind]) -> type[Kind]:
    """Register a variant; a class decorator."""
    _variants.append(kind())
    return kind


def variants() -> list[Variant]:
    """Return one object of every registered variant, third-party ones last."""
    import_plugins(("peftcore.methods.lora.variants",), ENTRY_POINTS)
    return _variants
