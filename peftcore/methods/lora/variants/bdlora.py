"""BD-LoRA: A or B is block-diagonal, so that servers can shard the adapter without communication. arXiv:2510.23346.

A layer whose path matches `target_modules_bd_a` has a block-diagonal A, one that matches `target_modules_bd_b` a
block-diagonal B. Only the blocks train and are saved, one below the other.
Shapes: i in_features, o out_features, r rank, n blocks; blocks of A (r, i/n), of B (o, r/n).
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftcore.errors import ConfigError
from peftcore.kernels.low_rank import LowRankBranch
from peftcore.methods.lora.options import Options
from peftcore.methods.lora.variant import Variant, register_variant

if TYPE_CHECKING:
    from peftcore.methods.lora.adapter import Lora

_BLOCKS = "_bdlora_blocks"
"""Attribute of the adapter: "lora_A_weight" or "lora_B_weight", whichever consists of blocks; None for neither."""


class BdLoraConfig(Options):
    """Options of BD-LoRA, for `LoraConfig(use_bdlora=...)`.

    Args:
        target_modules_bd_a: parts of paths; A is block-diagonal in layers whose path contains one of them.
        target_modules_bd_b: parts of paths; B is block-diagonal in layers whose path contains one of them.
        nblocks: number of blocks, such as the number of devices of a server.
        match_strict: refuse a target that neither list matches; False gives it plain LoRA.

    Raises:
        ConfigError: both lists have a part in common, or `nblocks` is not positive.
    """

    def __init__(
        self,
        target_modules_bd_a: list[str] | None = None,
        target_modules_bd_b: list[str] | None = None,
        nblocks: int = 1,
        match_strict: bool = True,
    ):
        if common := sorted({*(target_modules_bd_a or [])} & {*(target_modules_bd_b or [])}):
            raise ConfigError(
                f"BdLoraConfig: Found overlapping modules in target_modules_bd lists: {common}; A and B of one layer "
                "cannot both be block-diagonal"
            )
        if not isinstance(nblocks, int) or nblocks < 1:
            raise ConfigError(f"BdLoraConfig: nblocks must be a positive integer; got {nblocks!r}")
        super().__init__(
            target_modules_bd_a=target_modules_bd_a,
            target_modules_bd_b=target_modules_bd_b,
            nblocks=nblocks,
            match_strict=match_strict,
        )


@register_variant
class BdLora(Variant):
    """Variant for `use_bdlora=BdLoraConfig(...)`: A or B is block-diagonal."""

    option = "use_bdlora"
    options_class = BdLoraConfig
    stands_alone = True
    packs_factors = True

    def check_layer(self, lora: "Lora", path: str) -> None:
        options = _options(lora)
        in_a, in_b = (any(part in path for part in options[f"target_modules_bd_{side}"] or []) for side in ("a", "b"))
        if in_a and in_b:
            raise ConfigError(f"BD-LoRA: {path} matches both A and B block-diagonal patterns; leave it in one list")
        if options["match_strict"] and not (in_a or in_b):
            raise ConfigError(
                f"BD-LoRA: {path} matches neither A nor B block-diagonal patterns; add it to one of them, or set "
                "match_strict=False to give it plain LoRA"
            )
        sizes = {"lora_A_weight": (lora.base.in_features, lora.r), "lora_B_weight": (lora.r, lora.base.out_features)}
        name = "lora_A_weight" if in_a else "lora_B_weight" if in_b else None
        for size in sizes.get(name or "", ()):
            if size % options["nblocks"]:
                raise ConfigError(
                    f"BD-LoRA: {path} has {name} of {sizes[name or '']} features, and {size} is not divisible by "
                    f"nblocks={options['nblocks']}"
                )
        vars(lora)[_BLOCKS] = name

    def reset_parameters(self, lora: "Lora") -> None:
        self.prepare_to_read(lora)
        name, base = _blocks(lora), lora.base
        if name == "lora_A_weight":  # as HF PEFT draws it: in the base's type, on its device
            dtype = base.dtype if base.dtype.is_floating_point else torch.get_default_dtype()
            drawn = torch.empty(lora.lora_A_weight.shape, dtype=dtype, device=base.device)
            lora.lora_A_weight.copy_(nn.init.kaiming_uniform_(drawn))
        elif name == "lora_B_weight":
            nn.init.zeros_(lora.lora_B_weight)

    def prepare_to_read(self, lora: "Lora") -> None:
        if (name := _blocks(lora)) is None:
            return
        whole, blocks = lora.get_parameter(name), _options(lora)["nblocks"]
        rows, columns = (lora.r, lora.base.in_features) if name == "lora_A_weight" else (lora.base.out_features, lora.r)
        setattr(lora, name, nn.Parameter(whole.new_empty(rows, columns // blocks)))

    def computed_factors(self, lora: "Lora", a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        name, blocks = _blocks(lora), _options(lora)["nblocks"]
        if name == "lora_A_weight":
            return torch.block_diag(*a.chunk(blocks)), b
        return (a, torch.block_diag(*b.chunk(blocks))) if name == "lora_B_weight" else (a, b)

    def low_rank(self, lora: "Lora", branch: LowRankBranch) -> LowRankBranch:
        return branch


def _options(lora: "Lora") -> dict[str, Any]:
    options = lora.config.use_bdlora
    assert options is not None
    return options


def _blocks(lora: "Lora") -> str | None:
    return vars(lora)[_BLOCKS]
