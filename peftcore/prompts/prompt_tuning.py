"""Prompt tuning: n learned embeddings before the text, [P; E(x)]. arXiv:2104.08691.

For encoder-decoder models, HF PEFT stores 2n embeddings and uses the first n, before the encoder's text. Shapes: P
(n, d).
"""

from dataclasses import dataclass

import torch
from torch import nn

from peftcore.kernels.start_values import normal_
from peftcore.prompts.learner import embedding_of
from peftcore.prompts.virtual_tokens import VirtualTokens
from peftcore.prompts.vocabulary import VocabularyPromptConfig, initial_embeddings
from peftcore.registry import register


@dataclass
class PromptTuningConfig(VocabularyPromptConfig):
    """Options of prompt tuning, with HF PEFT's names."""


@register("PROMPT_TUNING", PromptTuningConfig)
class PromptTuning(VirtualTokens):
    """Learned embeddings as virtual tokens."""

    def __init__(self, config: PromptTuningConfig, model: nn.Module):
        super().__init__(config, model)
        self.embedding = embedding_of(torch.empty(self.total, self.width))

    @torch.no_grad()
    def reset_parameters(self, model: nn.Module) -> None:
        normal_(self.vectors)
        initial = initial_embeddings(self.config, model, self.total)
        if initial is not None:
            self.vectors.copy_(initial)
