"""Initialisations of A and B, chosen by `init_lora_weights`.

An initialisation sets A and B. It may also subtract the start s·B₀A₀ from the base (PiSSA), so that training begins at
the base's own output, or replace the base weight (LoftQ).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from peftcore.errors import ConfigError, TargetError
from peftcore.kernels.start_values import bias_, kaiming_uniform_, normal_
from peftcore.methods.lora.variant import Variant

if TYPE_CHECKING:
    from peftcore.methods.lora.adapter import Lora
    from peftcore.methods.lora.config import LoraConfig
    from peftcore.methods.lora.observer import Observer

Factors = tuple[Tensor, Tensor]
"""A (r, i) and B (o, r) of s·BA."""


class Initialisation(Variant):
    """Start values of A and B. By default LoRA's own: one factor random, the other zero."""

    option = "init_lora_weights"
    changes_layers = False
    layer_kinds = frozenset({"linear", "conv", "embedding", "parameter"})
    names: ClassVar[tuple[bool | str, ...]]
    """Values of `init_lora_weights`, for `is_chosen` and for error messages."""
    reads_base: ClassVar[bool] = False
    """True if the initialisation needs the base weight, also when A and B are then read from disk."""
    subtracts: ClassVar[bool] = False
    """True if s·B₀A₀ is subtracted from the base."""
    is_plain_on_disk: ClassVar[bool] = False
    """True if a saved adapter says `init_lora_weights=True`, because nobody needs the start's name to read it."""
    observer: ClassVar["type[Observer] | None"] = None
    """Class that computes the factors from data; `peftcore.initialize_from_data` runs it. None: no data needed."""
    prepared: ClassVar[str | None] = None
    """Attribute of a layer with what was computed from data before the adapter was made; deleted once it is used."""

    required_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """{field of the configuration that this initialisation reads: its value, with a warning, if the user gives none}"""

    def prepared_for(self, lora: "Lora") -> Any:
        """Return what was computed for a layer from data before its adapter was made; None if nothing was."""
        return None if self.prepared is None else vars(lora.base.layer).get(self.prepared)

    def is_chosen(self, config: "LoraConfig") -> bool:
        chosen = config.init_lora_weights
        return (chosen.lower() if isinstance(chosen, str) else chosen) in self.names

    def initialise(self, lora: "Lora") -> None:
        """Set A and B of one layer; called without gradients."""
        draw_defaults(lora)
        random, zero = random_and_zero(lora)
        normal_(random) if lora.base.kind == "embedding" else kaiming_uniform_(random)
        nn.init.zeros_(zero)


def draw_defaults(lora: "Lora") -> None:
    """Set A and B to the default values of the modules that hold them in HF PEFT, which draws these first."""
    draw = normal_ if lora.base.kind == "embedding" else kaiming_uniform_
    draw(lora.lora_A_weight)
    draw(lora.lora_B_weight)
    if lora.config.lora_bias:
        bias_(lora.get_parameter("lora_bias"), lora.lora_B_weight)  # `LoraBias` then sets it to zero


def random_and_zero(lora: "Lora") -> tuple[Tensor, Tensor]:
    """Return the factor that starts at random and the one that starts at zero: A and B, or B and A on an embedding."""
    return (
        (lora.lora_B_weight, lora.lora_A_weight)
        if lora.base.kind == "embedding"
        else (lora.lora_A_weight, lora.lora_B_weight)
    )


class WeightInitialisation(Initialisation):
    """Initialisation from the base weight, with the start subtracted from the base; linear layers only."""

    reads_base = True
    subtracts = True

    def factors(self, lora: "Lora", weight: Tensor) -> Factors:
        """Return A (r, i) and B (o, r) for the base weight (o, i) in float32."""
        raise NotImplementedError(f"{type(self).__name__} must define factors")

    def initialise(self, lora: "Lora") -> None:
        self.check_linear(lora)
        weight = lora.base.read_unmerged().float()
        self.check_rank(lora, weight)
        draw_defaults(lora)
        lora.set_factors(*self.factors(lora, weight))
        lora.subtract_start()

    def check_linear(self, lora: "Lora") -> None:
        """Raise TargetError unless the layer is linear."""
        if lora.base.kind != "linear":
            name = lora.config.init_lora_weights
            raise TargetError(f"init_lora_weights={name!r} fits linear layers only; exclude the {lora.base.kind} ones")

    def check_rank(self, lora: "Lora", weight: Tensor) -> None:
        """Raise ConfigError if the rank exceeds the number of singular values."""
        if lora.r > (most := min(weight.shape)):
            raise ConfigError(f"r={lora.r} exceeds the weight's {most} singular vectors; take a smaller r")


def truncated_svd(weight: Tensor, r: int, iterations: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (o, r), the r largest singular values, and Vᵀ (r, i) of a weight (o, i).

    Args:
        weight: W (o, i).
        r: Rank.
        iterations: Power iterations of a randomised decomposition; None: an exact one.
    """
    if iterations is None:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        return u[:, :r], s[:r], vh[:r]
    u, s, v = torch.svd_lowrank(weight, r, niter=iterations)
    return u, s, v.T


def principal_factors(weight: Tensor, r: int, scaling: float, iterations: int | None = None) -> Factors:
    """Return A and B with s·BA the best rank-r approximation of a weight, singular values shared by both sides.

    Args:
        weight: W (o, i).
        r: Rank.
        scaling: s.
        iterations: Power iterations of a randomised decomposition; None: an exact one.
    """
    u, s, vh = truncated_svd(weight, r, iterations)
    root = (s / scaling).sqrt()
    return root[:, None] * vh, u * root
