"""KaSA: W' = Wₖ + s·B diag(λ) A, with Wₖ the weight W without its r smallest singular values. arXiv:2412.06071.

The layer has Wₖ as its weight while it has an adapter with KaSA, so the model computes with Wₖ also while adapters are
disabled. Deleting or unloading the last such adapter gives W back, bit for bit. B starts at zero and λ at random.

The regulariser is β·Σλ² + γ·(‖BᵀB − I‖ + ‖AAᵀ − I‖), summed over the layers. peftcore's trainer adds it to the loss; in
another training loop, add `model._get_kasa_loss()`.
Shapes: i in_features, o out_features, r rank; λ (r,), A (r, i), B (o, r).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from peftcore.bases.plain import current_parameter
from peftcore.config import PeftConfig
from peftcore.errors import ConfigError, TargetError
from peftcore.kernels.low_rank import LowRankBranch
from peftcore.methods.lora.options import Options
from peftcore.methods.lora.variant import Variant, register_variant

if TYPE_CHECKING:
    from peftcore.methods.lora.adapter import Lora
    from peftcore.methods.lora.config import LoraConfig


class KasaConfig(Options):
    """Options of KaSA, for `LoraConfig(kasa_config=...)`. arXiv:2412.06071.

    Args:
        beta: weight β of the penalty Σλ² in the regulariser.
        gamma: weight γ of the penalty for factors that are not orthogonal.

    Raises:
        ConfigError: a weight is negative.
    """

    def __init__(self, beta: float = 1e-4, gamma: float = 1e-3):
        for name, value in (("beta", beta), ("gamma", gamma)):
            if value < 0:
                raise ConfigError(f"KasaConfig: `{name}` must be non-negative; got {value!r}")
        super().__init__(beta=beta, gamma=gamma)


@register_variant
class Kasa(Variant):
    """Variant for `kasa_config=KasaConfig(...)`: singular values λ between the factors, on a truncated weight."""

    option = "kasa_config"
    options_class = KasaConfig
    stands_alone = True
    replaces_base = True
    keys: ClassVar = {"lora_diag": "lora_diag"}
    beyond_low_rank = (
        "KaSA removes the smallest singular values of the base's weight, so its factors do not fit the base itself; "
        "merge the adapter into the base instead"
    )

    def check(self, config: "LoraConfig") -> None:
        start = config.initialisation()
        if start.subtracts or start.replaces_base:
            raise ConfigError(
                f"LoraConfig: kasa_config and init_lora_weights={config.init_lora_weights!r} exclude each other: both "
                "change the base weight; use init_lora_weights=True"
            )

    restricts_others = True

    def check_beside(self, config: "LoraConfig", other: PeftConfig) -> None:
        if not (other.is_prompt_learning or getattr(other, self.option, None)):
            raise ConfigError(
                "KaSA cannot be combined with adapters that don't use KaSA, because it changes the weights below them; "
                "delete one of the two, or give both a kasa_config"
            )

    def check_layer(self, lora: "Lora", path: str) -> None:
        base = lora.base
        if lora.r >= (most := min(base.in_features, base.out_features)):
            raise ConfigError(
                f"KaSA requires `r` to be smaller than the number of singular values of {path}, which is {most}; got "
                f"{lora.r}"
            )
        if base.quantized:
            raise TargetError(
                f"KaSA needs the weight of {path} in 16 bits or more, because rounding to 4 or 8 bits changes more "
                "than the singular values that KaSA removes; load the base without quantisation"
            )

    def add_parameters(self, lora: "Lora") -> None:
        lora.lora_diag = nn.Parameter(torch.empty(lora.r))

    def reset_parameters(self, lora: "Lora") -> None:
        diag, base = lora.get_parameter("lora_diag"), lora.base
        diag.copy_(torch.randn(lora.r, dtype=base.dtype, device=base.device))  # as HF PEFT draws it
        self.prepare_to_read(lora)

    @torch.no_grad()
    def prepare_to_read(self, lora: "Lora") -> None:
        weight = lora.base.read_original()
        if weight.is_meta:
            raise ConfigError("KaSA needs the values of the base's weights; load them before the adapter")
        lora.new_base = truncated(weight, lora.r)

    def computed_factors(self, lora: "Lora", a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return _diagonal(lora).to(a)[:, None] * a, b

    def low_rank(self, lora: "Lora", branch: LowRankBranch) -> LowRankBranch:
        return branch

    def regularizer(self, config: "LoraConfig", adapters: "Mapping[str, Lora]") -> Tensor:
        options = config.kasa_config
        assert options is not None
        penalties = [_penalties(lora) for lora in adapters.values()]
        terms = [options["beta"] * squares + options["gamma"] * distance for squares, distance in penalties]
        return torch.stack(terms).sum()


def truncated(weight: Tensor, r: int) -> Tensor:
    """Return a weight (o, i) without its r smallest singular values, computed in float32 as in HF PEFT."""
    u, s, vh = torch.linalg.svd(weight.float(), full_matrices=False)
    most = len(s) - r
    return (u[:, :most] * s[:most]) @ vh[:most]


def _diagonal(lora: "Lora") -> Tensor:
    diagonal = current_parameter(lora, "lora_diag")
    assert diagonal is not None
    return diagonal


def _penalties(lora: "Lora") -> tuple[Tensor, Tensor]:
    """Return Σλ² and ‖BᵀB − I‖ + ‖AAᵀ − I‖ of one layer."""
    a, b, diag = lora.lora_A_weight.float(), lora.lora_B_weight.float(), _diagonal(lora).float()
    identity = torch.eye(lora.r, device=diag.device)
    return diag.square().sum(), (b.T @ b - identity).norm() + (a @ a.T - identity).norm()
