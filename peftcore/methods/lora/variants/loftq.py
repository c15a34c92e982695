"""LoftQ: W is replaced by its quantisation Q, and s·BA starts as the best approximation of W − Q. arXiv:2310.08659.

Each of the `loftq_iter` alternations quantises W − s·BA and fits the factors again.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peftcore.errors import ConfigError, TargetError, require_extra, suggestion
from peftcore.methods.lora.initialisation import WeightInitialisation, draw_defaults, principal_factors
from peftcore.methods.lora.variant import register_variant

if TYPE_CHECKING:
    from peftcore.methods.lora.adapter import Lora
    from peftcore.methods.lora.config import LoraConfig

DEFAULTS: dict[str, Any] = {"loftq_bits": 4, "loftq_iter": 1}
"""`loftq_config` under PEFT's names: bits of the quantisation, and number of alternations."""


@register_variant
class LoftqStart(WeightInitialisation):
    """Initialisation `init_lora_weights="loftq"`: a quantised base, and s·BA near the quantisation error."""

    names = ("loftq",)
    subtracts = False
    replaces_base = True

    def check(self, config: "LoraConfig") -> None:
        options = {**DEFAULTS, **(config.loftq_config or {})}
        for key in options.keys() - DEFAULTS.keys():
            raise ConfigError(f"LoraConfig: loftq_config has no {key!r}{suggestion(key, DEFAULTS)}")
        if (bits := options["loftq_bits"]) not in (4, 8):
            raise ConfigError(f"LoraConfig: loftq_config['loftq_bits'] must be 4 or 8; got {bits!r}")
        if not isinstance(turns := options["loftq_iter"], int) or turns < 1:
            raise ConfigError(
                f"LoraConfig: loftq_config['loftq_iter'] must be a positive integer; got {turns!r}; try 1"
            )

    def initialise(self, lora: "Lora") -> None:
        self.check_linear(lora)
        weight = lora.base.read_original().float()
        self.check_rank(lora, weight)
        if lora.base.quantized:
            raise TargetError(
                "init_lora_weights='loftq' needs the 16-bit weight, and this base is already quantised; call "
                "peftcore.replace_lora_weights_loftq(model, directory of the original) after get_peft_model"
            )
        draw_defaults(lora)
        options = {**DEFAULTS, **(lora.config.loftq_config or {})}
        residual = quantised = weight
        for _ in range(options["loftq_iter"]):
            quantised = _quantised(residual, options["loftq_bits"])
            a, b = principal_factors(weight - quantised, lora.r, lora.scaling)
            residual = weight - lora.scaling * b @ a
            lora.set_factors(a, b)
        lora.new_base = quantised


def _quantised(weight: Tensor, bits: int) -> Tensor:
    """Return the dequantised NF4 (4 bits) or absmax int8 (8 bits) form of a weight."""
    if bits == 4:
        require_extra("quant", "init_lora_weights='loftq'", "bitsandbytes")
        import bitsandbytes.functional as bnb

        codes, state = bnb.quantize_4bit(weight.contiguous(), quant_type="nf4")
        return bnb.dequantize_4bit(codes, state).to(weight)
    scale = weight.abs().amax(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
    return (weight / scale * 127).round() * scale / 127
