"""Cartridge: keys and values of a text in each attention, trained as they are, the first m frozen. arXiv:2506.06266.

The prefix starts at random. `initialize_kv_prefix_from_text` writes the keys and values of a text into it. Shapes: n
virtual tokens, m of them frozen, L layers, k key/value heads of width w; frozen (m, 2·L·k·w), trained (n − m, 2·L·k·w).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftcore.config import PromptLearningConfig
from peftcore.errors import ConfigError
from peftcore.kernels.start_values import normal_
from peftcore.prompts.key_value_prefix import KeyValuePrefix
from peftcore.prompts.learner import EMBEDDINGS
from peftcore.registry import register


@dataclass
class CartridgeConfig(PromptLearningConfig):
    """Options of Cartridge, with HF PEFT's names; token_dim is k·w and num_attention_heads is k."""

    num_frozen_tokens: int = 1
    """m, the first virtual tokens that do not train (count): models use the first token as an attention sink."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_frozen_tokens()

    def check_complete(self) -> None:
        super().check_complete()
        self._check_frozen_tokens()

    def _check_frozen_tokens(self) -> None:
        most, frozen = self.num_virtual_tokens, self.num_frozen_tokens
        if frozen < 0 or (most is not None and frozen > most):
            end = "" if most is None else f" and at most num_virtual_tokens={most}"
            raise ConfigError(f"CartridgeConfig: num_frozen_tokens must be at least 0{end}; got {frozen}; try 1")


@register("CARTRIDGE", CartridgeConfig)
class Cartridge(KeyValuePrefix):
    """A prefix of keys and values, of which the first tokens are frozen."""

    frozen_embedding: Tensor | None

    def __init__(self, config: CartridgeConfig, model: nn.Module):
        super().__init__(config, model)
        frozen = config.num_frozen_tokens
        self.register_buffer("frozen_embedding", torch.empty(frozen, self.size) if frozen else None)
        self.trainable_embedding = nn.Parameter(torch.empty(self.count - frozen, self.size))

    @property
    def vectors(self) -> Tensor:
        """The trained tokens."""
        return self.trainable_embedding

    @property
    def weight(self) -> Tensor:
        """All tokens (n, 2·L·k·w), the frozen ones first."""
        return self.encoded()

    @torch.no_grad()
    def reset_parameters(self, model: nn.Module) -> None:
        if self.frozen_embedding is not None:
            normal_(self.frozen_embedding)
        normal_(self.trainable_embedding)

    def encoded(self) -> Tensor:
        if self.frozen_embedding is None:
            return self.trainable_embedding
        return torch.cat([self.frozen_embedding.to(self.trainable_embedding), self.trainable_embedding])

    @torch.no_grad()
    def load_checkpoint_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        frozen, trained = tensors[EMBEDDINGS].tensor_split([self.config.num_frozen_tokens])
        if self.frozen_embedding is not None:
            self.frozen_embedding.copy_(frozen)
        self.trainable_embedding.copy_(trained)
