"""Prefix tuning: n learned keys and values in each attention, softmax(q [K_P; K]ᵀ) [V_P; V]. arXiv:2101.00190.

With projection, [K_P, V_P] of all layers = W₂ tanh(W₁ P). Shapes: L layers, k key/value heads of width w, P (n, k·w).
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.config import PromptLearningConfig
from peftcore.kernels.start_values import module_, normal_, without_values
from peftcore.prompts.key_value_prefix import KeyValuePrefix
from peftcore.prompts.learner import embedding_of
from peftcore.registry import register


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Options of prefix tuning, with HF PEFT's names; token_dim is k·w and num_attention_heads is k."""

    prefix_projection: bool = False
    """Compute the prefix by a two-layer MLP during training."""
    encoder_hidden_size: int | None = None
    """Hidden size of that MLP; None: token_dim."""
    init_weights: str | None = None
    """"zero": keys and values start at zero; None: normal random numbers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.one_of("init_weights", self.init_weights, (None, "zero"))
        if self.encoder_hidden_size is not None:
            self.positive("encoder_hidden_size")

    def without_effect(self) -> dict[str, str]:
        unused = self.encoder_hidden_size is not None and not self.prefix_projection
        return {"encoder_hidden_size": "prefix_projection=True"} if unused else {}


@register("PREFIX_TUNING", PrefixTuningConfig)
class PrefixTuning(KeyValuePrefix):
    """A learned prefix of the keys and values of every layer."""

    transform: nn.Sequential | None

    def __init__(self, config: PrefixTuningConfig, model: nn.Module):
        super().__init__(config, model)
        width, hidden = config.token_dim, config.encoder_hidden_size
        assert width and hidden
        self.transform = None
        if config.prefix_projection:
            self.embedding = embedding_of(torch.empty(self.count, width))
            down, up = (without_values(nn.Linear, *size) for size in ((width, hidden), (hidden, self.size)))
            self.transform = nn.Sequential(down, nn.Tanh(), up)
        else:
            self.embedding = embedding_of(torch.empty(self.count, self.size))

    @property
    def prefix_projection(self) -> bool:
        """True while an MLP computes the prefix."""
        return self.transform is not None

    @classmethod
    def completed(cls, config: PrefixTuningConfig, model: nn.Module) -> Any:
        filled = super().completed(config, model)
        return dataclasses.replace(filled, encoder_hidden_size=config.encoder_hidden_size or filled.token_dim)

    @torch.no_grad()
    def reset_parameters(self, model: nn.Module) -> None:
        normal_(self.vectors)
        if self.transform is not None:
            module_(self.transform)
        if self.config.init_weights == "zero":
            for parameter in (self.vectors,) if self.transform is None else self.transform[-1].parameters():
                parameter.zero_()

    # -- disk ------------------------------------------------------------------------------------------------

    def encoded(self) -> Tensor:
        return self.vectors if self.transform is None else self.transform(self.vectors)

    def has_encoder(self) -> bool:
        return self.transform is not None

    def drop_encoder(self, encoded: Tensor) -> None:
        self.transform = None
        self.embedding = embedding_of(encoded.to(self.vectors)).requires_grad_(False)
