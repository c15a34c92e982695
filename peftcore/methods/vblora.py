"""VB-LoRA: y = Wx + b + B(A x), where A and B are tiles of vectors mixed from one bank. arXiv:2405.15179.

A tile is Σ_j softmax(top-k logits)_j · bank_j: the layers share the bank, each tile has its logits.

Shapes: i in_features, o out_features, r rank, h vectors in the bank, l their length, k topk; bank (h, l), logits of A
(r, i/l, h), logits of B (o/l, r, h); A (r, i), B (o, r).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from peftcore.adapter import Adapter, Shared
from peftcore.bases import BaseWeight
from peftcore.config import TunerConfig
from peftcore.errors import ConfigError, TrainingError
from peftcore.kernels.start_values import normal_, uniform_
from peftcore.registry import register

_LOGITS = ("vblora_logits_A", "vblora_logits_B")


@dataclass
class VBLoRAConfig(TunerConfig):
    """VB-LoRA's options under PEFT's names."""

    size_fields: ClassVar[tuple[str, ...]] = ("r", "num_vectors")

    r: int = 4
    """Rank (count)."""
    num_vectors: int = 256
    """Vectors in the bank (count)."""
    vector_length: int = 256
    """Length of a vector; it must divide the sizes of every adapted layer."""
    topk: int = 2
    """Vectors mixed into one tile (count)."""
    save_only_topk_weights: bool = False
    """Save k indices and k − 1 weights per tile instead of h logits: enough to use or merge, not to train further."""
    vblora_dropout: float = 0.0
    """Probability of dropping an element of the adapter's input in training."""
    init_vector_bank_bound: float = 0.02
    """Bound of the uniform start values of the bank."""
    init_logits_std: float = 0.1
    """Standard deviation of the logits at the start."""
    bias: str = "none"
    """Biases of the model that train too: "none", "all" or "vblora_only"."""
    fan_in_fan_out: bool = False
    """Read and saved for PEFT; without effect, because the orientation is found per layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r", "num_vectors", "vector_length", "topk")
        self.probability("vblora_dropout")
        self.one_of("bias", self.bias, ("none", "all", "vblora_only"))
        if self.topk > self.num_vectors:
            raise ConfigError(f"VBLoRAConfig: topk must not exceed num_vectors={self.num_vectors}; got {self.topk}")


class VectorBank(Shared):
    """Vectors that all layers share."""

    def __init__(self, config: VBLoRAConfig):
        super().__init__()
        self.vblora_vector_bank = nn.Parameter(torch.empty(config.num_vectors, config.vector_length))


@register("VBLORA", VBLoRAConfig)
class VBLora(Adapter):
    """VB-LoRA at one layer."""

    dropout_option = "vblora_dropout"

    shared: VectorBank

    def __init__(self, config: VBLoRAConfig, base: BaseWeight, path: str):
        super().__init__(config, base, path)
        length, tiles = config.vector_length, []
        for side, size in (("in_features", base.in_features), ("out_features", base.out_features)):
            if size % length:
                raise ConfigError(
                    f"VBLORA: vector_length must divide the sizes of every layer; {path} has {side}={size}, got "
                    f"vector_length={length}; take a common divisor or exclude this layer"
                )
            tiles.append(size // length)
        self.config = config
        self.add_dropout()
        self.vblora_logits_A = nn.Parameter(torch.empty(config.r, tiles[0], config.num_vectors))
        self.vblora_logits_B = nn.Parameter(torch.empty(tiles[1], config.r, config.num_vectors))
        self.choice_is_frozen = False
        """True if the logits were read from a directory with the top k only."""

    @classmethod
    def make_shared(cls, config: VBLoRAConfig, bases: Mapping[str, BaseWeight]) -> VectorBank:
        return VectorBank(config)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        # as in PEFT, each layer draws the bank anew, and the last layer's draw stays
        uniform_(self.shared.vblora_vector_bank, self.config.init_vector_bank_bound)
        for name in _LOGITS:
            normal_(getattr(self, name), std=self.config.init_logits_std)

    def prepare_to_read(self) -> None:
        """Do nothing: a directory has the bank, and of the logits all that it needs."""

    def _tiles(self, logits: Tensor) -> Tensor:
        """Return the mixed vectors (..., l) for logits (..., h)."""
        chosen, places = logits.topk(self.config.topk)
        bank = self.shared.vblora_vector_bank.to(logits.device)
        return (chosen.softmax(-1)[..., None] * bank[places]).sum(-2)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Return A (r, i) and B (o, r)."""
        down = self._tiles(self.vblora_logits_A).flatten(1)
        up = self._tiles(self.vblora_logits_B).transpose(1, 2).flatten(0, 1)
        return down, up

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        if self.training and self.choice_is_frozen and self.vblora_logits_A.requires_grad and torch.is_grad_enabled():
            raise TrainingError(
                "VBLORA: this adapter was saved with save_only_topk_weights=True, which keeps too little to go on "
                "training; train from a directory saved without it"
            )
        down, up = self._factors()
        return self.base.add_pointwise(y, self.base.apply(self.dropped(x), down).to(y.dtype), up)

    def delta_weight(self) -> Tensor:
        down, up = self._factors()
        return up @ down

    # -- disk: all logits, or the indices of the top k and all but the last of their weights ---------------------

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        if not self.config.save_only_topk_weights:
            return super().checkpoint_tensors()
        packed = {}
        for name in _LOGITS:
            chosen, places = getattr(self, name).detach().topk(self.config.topk)
            packed[f"{name}_topk_indices"] = places.to(_index_type(self.config.num_vectors))
            packed[f"{name}_topk_weights"] = chosen.softmax(-1)[..., :-1]
        return packed

    @torch.no_grad()
    def load_checkpoint_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        if not self.config.save_only_topk_weights:
            super().load_checkpoint_tensors(tensors)
            return
        self.choice_is_frozen = True
        for name in _LOGITS:
            logits = getattr(self, name)
            weights = tensors[f"{name}_topk_weights"].to(logits)
            last = (1 - weights.sum(-1, keepdim=True)).clamp(min=0)  # rounding may leave it below zero
            places = tensors[f"{name}_topk_indices"].to(logits.device, torch.long)
            logits.fill_(float("-inf")).scatter_(-1, places, torch.cat([weights, last], -1).log())

    def training_state(self) -> dict[str, Tensor]:
        if not self.config.save_only_topk_weights:
            return {}
        return {name: getattr(self, name).detach().clone() for name in _LOGITS}

    @torch.no_grad()
    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        for name, logits in state.items():
            self.get_parameter(name).copy_(logits)
            self.choice_is_frozen = False


def _index_type(vectors: int) -> torch.dtype:
    """Return the smallest integer type that PEFT uses for indices into a bank of this size."""
    if vectors < 2**8:
        return torch.uint8
    if vectors < 2**15:
        return torch.int16
    return torch.int32 if vectors < 2**31 else torch.int64
