"""QA-LoRA: A sees the means of groups of inputs, so merging only shifts each group's zero point. arXiv:2309.14717.

With m the means of groups of g inputs, h = (i/g)·A m. So ΔW = s·B A', with A' = (i/g²)·A and each column g times.
HF PEFT has this on GPTQ layers only, and ignores the option elsewhere; here it acts on every linear layer, and merges.
Shapes: i in_features, r rank, g group size; A (r, i/g).
"""

import math
from typing import TYPE_CHECKING

from torch import Tensor, nn

from peftcore.errors import ConfigError
from peftcore.kernels.low_rank import LowRankBranch
from peftcore.kernels.start_values import kaiming_uniform_
from peftcore.methods.lora.variant import Variant, register_variant

if TYPE_CHECKING:
    from peftcore.methods.lora.adapter import Lora
    from peftcore.methods.lora.config import LoraConfig


@register_variant
class QaLora(Variant):
    """Variant for `use_qalora=True`: A sees the means of groups of `qalora_group_size` inputs."""

    option = "use_qalora"
    stands_alone = True
    packs_factors = True

    def check(self, config: "LoraConfig") -> None:
        config.positive("qalora_group_size")

    def check_layer(self, lora: "Lora", path: str) -> None:
        group, inputs = lora.config.qalora_group_size, lora.base.in_features
        if inputs % group:
            raise ConfigError(
                f"use_qalora: {path} has {inputs} inputs, which is not divisible by qalora_group_size={group}; try "
                f"{math.gcd(inputs, group)}"
            )

    def reset_parameters(self, lora: "Lora") -> None:
        self.prepare_to_read(lora)
        kaiming_uniform_(lora.lora_A_weight)

    def prepare_to_read(self, lora: "Lora") -> None:
        lora.lora_A_weight = nn.Parameter(
            lora.lora_A_weight.new_empty(lora.r, lora.base.in_features // lora.config.qalora_group_size)
        )

    def computed_factors(self, lora: "Lora", a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        group = lora.config.qalora_group_size
        return a.repeat_interleave(group, dim=1) * (a.shape[1] / group), b

    def low_rank(self, lora: "Lora", branch: LowRankBranch) -> LowRankBranch:
        return branch
