"""Prompt tuning: n learned embeddings before the text, [P; E(x)]. arXiv:2104.08691.

With two submodules (encoder and decoder) PEFT keeps 2n of them and reads the first n, before the encoder's text.
Shapes: P (n, d).
"""

from dataclasses import dataclass

import torch
from torch import nn

from peftcore.prompts.virtual_tokens import VirtualTokens
from peftcore.prompts.vocabulary import VocabularyPromptConfig, start_of
from peftcore.registry import register


@dataclass
class PromptTuningConfig(VocabularyPromptConfig):
    """Prompt tuning's options under PEFT's names."""


@register("PROMPT_TUNING", PromptTuningConfig)
class PromptTuning(VirtualTokens):
    def __init__(self, config: PromptTuningConfig, model: nn.Module):
        super().__init__(config, model)
        self.embedding = nn.Parameter(torch.empty(self.total, self.width))

    @torch.no_grad()
    def reset_parameters(self, model: nn.Module) -> None:
        start = start_of(self.config, model, self.total)
        self.embedding.normal_() if start is None else self.embedding.copy_(start)
