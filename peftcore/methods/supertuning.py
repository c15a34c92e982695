"""Super-Tuning: W' = W + S + s·BA, where S trains only at W's largest (or smallest) entries. arXiv:2607.09287.

The part s·BA is the paper's Supra, and is there with `r` alone.

Shapes: i in_features, o out_features, n = ⌊(1 − sparsity)·o·i⌋ entries of S, r rank, s = lora_alpha / r;
supertuning_values (n,) are the entries, supertuning_indices (n,) their places in the flattened weight (o, i), in the
order of |W|; A (r, i), B (o, r).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight
from peftcore.config import TunerConfig
from peftcore.errors import CheckpointError, ConfigError
from peftcore.kernels.start_values import kaiming_uniform_, normal_
from peftcore.registry import register


@dataclass
class SupertuningConfig(TunerConfig):
    """Super-Tuning's options under PEFT's names."""

    not_saved_if_none: ClassVar[tuple[str, ...]] = ("exclude_modules", "layers_pattern", "layers_to_transform")

    sparsity: float = 0.99
    """Share of the weight's entries that do not train."""
    select_top: bool = True
    """True: the entries with the largest absolute values train; False: those with the smallest."""
    r: int | None = None
    """Rank (count) of BA; None: only the entries train."""
    lora_alpha: float | None = None
    """Scaling of BA: s = lora_alpha / r; None: 2r."""
    lora_dropout: float = 0.0
    """Probability of dropping an element of the input of BA in training."""
    init_weights: bool = True
    """True: S and B start at zero; False: random, for tests."""
    save_precomputed_indices: bool = True
    """False omits the indices from the directory; loading then chooses them again by the base's weight."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.probability("sparsity", "lora_dropout")
        if self.r is not None:
            self.positive("r")
            self.lora_alpha = 2 * self.r if self.lora_alpha is None else self.lora_alpha
        elif self.lora_alpha is not None:
            raise ConfigError(
                f"SupertuningConfig: lora_alpha scales BA, which is there with r alone; got lora_alpha="
                f"{self.lora_alpha} and r=None; give r, or leave lora_alpha out"
            )

    def without_effect(self) -> dict[str, str]:
        return {"lora_dropout": "r"} if self.lora_dropout and self.r is None else {}


@register("SUPERTUNING", SupertuningConfig)
class Supertuning(Adapter):
    """Super-Tuning at one layer."""

    dropout_option = "lora_dropout"

    supertuning_indices: Tensor

    def __init__(self, config: SupertuningConfig, base: BaseWeight, path: str):
        super().__init__(config, base, path)
        self.config, self.path = config, path
        self.shape = (base.out_features, base.in_features)
        entries = base.out_features * base.in_features
        count = int(entries * (1 - config.sparsity))
        if not count:
            raise ConfigError(
                f"SUPERTUNING: sparsity={config.sparsity} leaves no trainable entries of the {entries} at {path}; give "
                f"at most {math.floor(1e4 * (1 - 1 / entries)) / 1e4}"
            )
        self.supertuning_values = nn.Parameter(torch.empty(count))
        self.register_buffer("supertuning_indices", torch.zeros(count, dtype=torch.int32))
        if config.r is not None:
            self.scaling = 2.0 if config.lora_alpha is None else config.lora_alpha / config.r
            self.add_dropout()
            self.supertuning_lora_A = nn.Parameter(torch.empty(config.r, base.in_features))
            self.supertuning_lora_B = nn.Parameter(torch.empty(base.out_features, config.r))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self._choose()
        zeros = self.config.init_weights
        self.supertuning_values.zero_() if zeros else normal_(self.supertuning_values)
        if self.config.r is not None:
            a, b = self.supertuning_lora_A, self.supertuning_lora_B
            for factor in (a, b, a):  # PEFT draws A twice
                kaiming_uniform_(factor)
            b.zero_() if zeros else kaiming_uniform_(b)

    def prepare_to_read(self) -> None:
        if not self.config.save_precomputed_indices:
            self._choose()

    @torch.no_grad()
    def _choose(self) -> None:
        """Choose the entries that train by the base's weight."""
        scores = self.base.read_unmerged().abs().flatten()
        chosen = scores.topk(len(self.supertuning_values), largest=self.config.select_top).indices
        self.supertuning_indices.copy_(chosen)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        y = y + self.base.apply(x, self._sparse()).to(y.dtype)
        if self.config.r is None:
            return y
        h = self.base.apply(self.dropped(x), self.supertuning_lora_A)
        return self.base.add_pointwise(y, h.to(y.dtype), self.scaling * self.supertuning_lora_B)

    def _sparse(self) -> Tensor:
        """Return S (o, i)."""
        values = self.supertuning_values
        flat = values.new_zeros(self.shape[0] * self.shape[1])
        return flat.scatter_add(0, self.supertuning_indices.long(), values).view(self.shape)

    def delta_weight(self) -> Tensor:
        if self.config.r is None:
            return self._sparse()
        return self._sparse() + self.scaling * self.supertuning_lora_B @ self.supertuning_lora_A

    # -- disk: the indices are saved beside the values ----------------------------------------------------------------

    def checkpoint_keys(self) -> dict[str, str]:
        keys = {"supertuning_values": "supertuning_values"}
        factors = () if self.config.r is None else ("supertuning_lora_A", "supertuning_lora_B")
        return keys | {name: f"{name}.weight" for name in factors}

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        indices = {"supertuning_indices": self.supertuning_indices} if self.config.save_precomputed_indices else {}
        return super().checkpoint_tensors() | indices

    @torch.no_grad()
    def load_checkpoint_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        if self.config.save_precomputed_indices:
            indices, entries = tensors["supertuning_indices"], self.shape[0] * self.shape[1]
            if indices.min() < 0 or indices.max() >= entries:
                raise CheckpointError(
                    f"SUPERTUNING: supertuning_indices at {self.path} must be below the {entries} entries of the "
                    f"weight; got {indices.min().item()} to {indices.max().item()}; the file is damaged"
                )
            self.supertuning_indices.copy_(indices)
        super().load_checkpoint_tensors(tensors)
