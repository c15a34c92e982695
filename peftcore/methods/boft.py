"""BOFT: y = s ⊙ (W Bᵀx) + b, B a product of m orthogonal butterfly factors. arXiv:2311.06243.

Shapes: i in_features, k kernel, o out_features, n blocks of size c: n·c = i·k; boft_R (m, n, c, c), of which the skew
part S gives a block (I − S)(I + S)⁻¹; boft_s (o, 1), or (1, o) for convolutions. Factor j joins features 2ʲ half
blocks apart. Unlike PEFT, m > 1 needs no CUDA extension, and a convolution keeps its dilation and padding.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight
from peftcore.config import TunerConfig
from peftcore.errors import ConfigError
from peftcore.kernels.maths import cayley, drop_blocks, rotate_blocks, scaled, weight_shape, widened
from peftcore.kernels.start_values import normal_
from peftcore.registry import register


@dataclass
class BOFTConfig(TunerConfig):
    """BOFT's options under PEFT's names."""

    boft_block_size: int = 4
    """Features that one block rotates (count); give this or boft_block_num, and 0 for the other."""
    boft_block_num: int = 0
    """Blocks in a layer (count)."""
    boft_n_butterfly_factor: int = 1
    """Factors m (count); 1 is OFT, and each further factor doubles the number of features that mix."""
    boft_dropout: float = 0.0
    """Share of one random factor's blocks that are the identity in one forward pass in training."""
    bias: str = "none"
    """Biases of the model that train too: "none", "all" or "boft_only"."""
    init_weights: bool = True
    """True: B starts at the identity and s at one; False: random, for tests."""
    fan_in_fan_out: bool = False
    """Read and saved for PEFT; without effect, because the orientation is found per layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.boft_block_size) == bool(self.boft_block_num):
            raise ConfigError(
                "BOFTConfig: give either boft_block_size or boft_block_num and set the other to 0, since their product "
                f"is the layer's size; got {self.boft_block_size} and {self.boft_block_num}"
            )
        self.positive("boft_block_size" if self.boft_block_size else "boft_block_num", "boft_n_butterfly_factor")
        self.probability("boft_dropout")
        self.one_of("bias", self.bias, ("none", "all", "boft_only"))

    def blocks(self, features: int, path: str) -> tuple[int, int]:
        """Return (number, size) of the blocks of a layer with this many features to rotate."""
        asked, m = self.boft_block_size or self.boft_block_num, self.boft_n_butterfly_factor
        number, size = features // asked, asked
        if self.boft_block_num:
            number, size = size, number
        if features % asked:
            fits = min((n for n in range(1, features + 1) if features % n == 0), key=lambda n: abs(n - asked))
            option = "boft_block_size" if self.boft_block_size else "boft_block_num"
            raise ConfigError(f"BOFT: {option}={asked} must divide the {features} features of {path}; try {fits}")
        if m > 1 and (size % 2 or number % 2 ** (m - 1)):
            raise ConfigError(
                f"BOFT: {m} butterfly factors need blocks of even size and a multiple of {2 ** (m - 1)} of them; "
                f"{path} has {number} blocks of {size}; take fewer factors or other blocks"
            )
        return number, size


@register("BOFT", BOFTConfig)
class BOFT(Adapter):
    """BOFT at one layer."""

    layer_kinds = frozenset({"linear", "conv"})

    def __init__(self, config: BOFTConfig, base: BaseWeight, path: str):
        super().__init__(config, base, path)
        self.weight_space_forward = base.kind == "conv"
        number, size = config.blocks(math.prod(weight_shape(base)[1:]), path)
        self.dropout = config.boft_dropout
        self.starts_at_base = config.init_weights
        o = base.out_features
        self.boft_R = nn.Parameter(torch.empty(config.boft_n_butterfly_factor, number, size, size))
        self.boft_s = nn.Parameter(torch.empty((1, o) if base.kind == "conv" else (o, 1)))

    @property
    def boft_block_num(self) -> int:
        """n, HF PEFT's attribute of the layer."""
        return self.boft_R.shape[1]

    @property
    def boft_block_size(self) -> int:
        """c, HF PEFT's attribute of the layer."""
        return self.boft_R.shape[2]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.zeros_(self.boft_R)
        nn.init.ones_(self.boft_s)
        if not self.starts_at_base:
            normal_(self.boft_R, std=0.1)
            normal_(self.boft_s, mean=1, std=0.1)

    @classmethod
    def config_of_file(cls, config: BOFTConfig, read_tensors: Callable[[], Mapping[str, Tensor]]) -> BOFTConfig:
        """Return the configuration with the file's number of factors.

        HF PEFT without its compiled CUDA code makes one factor, whatever the configuration says.
        """
        if config.boft_n_butterfly_factor == 1:
            return config
        counts = {len(tensor) for key, tensor in read_tensors().items() if key.endswith(".boft_R")}
        return dataclasses.replace(config, boft_n_butterfly_factor=1) if counts == {1} else config

    def repeated_keys(self) -> set[str]:
        return super().repeated_keys() | {"boft_P"}  # the permutations, which HF PEFT saved before 0.13

    def factors(self) -> list[Tensor]:
        """Return the blocks (n, c, c) of each factor, in float32 or float64."""
        blocks = widened(self.boft_R)
        return list(cayley(0.5 * (blocks - blocks.mT)))

    def _acting_factors(self) -> list[Tensor]:
        factors = self.factors()
        if self.training and self.dropout:
            chosen = int(torch.randint(len(factors), (), device="cpu"))
            factors[chosen] = drop_blocks(factors[chosen], self.dropout)
        return factors

    def before(self, x: Tensor) -> Tensor:
        for j, blocks in reversed(list(enumerate(self._acting_factors()))):
            x = _turned(x, blocks, j)
        return x

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        scale, bias = self.boft_s.flatten(), self.base.unmerged_bias
        return scaled(y, scale) if bias is None else torch.addcmul(y, y - bias.to(y.dtype), (scale - 1).to(y.dtype))

    def forward_weight(self, weight: Tensor) -> Tensor:
        return self._merged(weight, self._acting_factors())

    def merged_weight(self, weight: Tensor) -> Tensor:
        return self._merged(weight, self.factors())

    def _merged(self, weight: Tensor, factors: list[Tensor]) -> Tensor:
        flat = weight.flatten(1)
        for j, blocks in enumerate(factors):
            flat = _turned(flat, blocks.mT, j)
        return (flat * self.boft_s.view(-1, 1).to(weight)).view(weight.shape)

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        """Return the bias with the changes by the adapters below scaled by s; the base's own bias is not scaled."""
        own = self.base.unmerged_bias
        if bias is None or own is None or bias is own:
            return bias
        return own + (bias - own) * self.boft_s.flatten()


def _turned(x: Tensor, blocks: Tensor, j: int) -> Tensor:
    """Return x P diag(blocks) Pᵀ, where P places half blocks that are 2ʲ apart side by side."""
    if j == 0:
        return rotate_blocks(x, blocks)
    half = blocks.shape[-1] // 2
    x = x.unflatten(-1, (-1, 2, 2**j, half)).transpose(-3, -2).flatten(-4)
    return rotate_blocks(x, blocks).unflatten(-1, (-1, 2**j, 2, half)).transpose(-3, -2).flatten(-4)
