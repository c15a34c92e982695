"""P-tuning: virtual tokens that an MLP or an LSTM computes from learned embeddings, [f(P); E(x)]. arXiv:2103.10385.

MLP: f(P) = W₃ relu(W₂ relu(W₁ P)). Bidirectional LSTM: f(P) = W₂ relu(W₁ lstm(P)). Shapes: P (n, d), hidden size h.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.config import PromptLearningConfig
from peftcore.kernels.start_values import module_, normal_, without_values
from peftcore.prompts.learner import embedding_of
from peftcore.prompts.virtual_tokens import VirtualTokens
from peftcore.registry import register


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """Options of P-tuning, with HF PEFT's names."""

    encoder_reparameterization_type: str = "MLP"
    """"MLP" (three layers) or "LSTM"."""
    encoder_hidden_size: int | None = None
    """h; None: the embedding width."""
    encoder_num_layers: int = 2
    """Number of LSTM layers."""
    encoder_dropout: float = 0.0
    """Dropout between the LSTM layers during training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        encoder = self.encoder_reparameterization_type
        self.encoder_reparameterization_type = str(getattr(encoder, "value", encoder))
        self.one_of("encoder_reparameterization_type", self.encoder_reparameterization_type, ("MLP", "LSTM"))
        self.positive("encoder_num_layers", *(["encoder_hidden_size"] if self.encoder_hidden_size is not None else []))
        self.probability("encoder_dropout")

    def without_effect(self) -> dict[str, str]:
        if self.encoder_reparameterization_type == "LSTM":
            return {}
        unused = [
            name for name, usual in (("encoder_num_layers", 2), ("encoder_dropout", 0)) if vars(self)[name] != usual
        ]
        return dict.fromkeys(unused, "encoder_reparameterization_type='LSTM'")


@register("P_TUNING", PromptEncoderConfig)
class PTuning(VirtualTokens):
    """Virtual tokens computed by a prompt encoder."""

    lstm_head: nn.LSTM | None
    mlp_head: nn.Sequential | None

    def __init__(self, config: PromptEncoderConfig, model: nn.Module):
        super().__init__(config, model)
        d, h = self.width, config.encoder_hidden_size
        assert h is not None
        self.embedding = embedding_of(torch.empty(self.total, d))
        # HF PEFT's attributes of the encoder
        self.token_dim = self.input_size = self.output_size = d
        self.hidden_size, self.total_virtual_tokens = h, self.total
        self.encoder_type = config.encoder_reparameterization_type
        self.lstm_head = None
        if config.encoder_reparameterization_type == "MLP":
            self.mlp_head = nn.Sequential(_linear(d, h), nn.ReLU(), _linear(h, h), nn.ReLU(), _linear(h, d))
            return
        layers = config.encoder_num_layers
        dropout = config.encoder_dropout if layers > 1 else 0.0
        self.lstm_head = without_values(nn.LSTM, d, h, layers, dropout=dropout, bidirectional=True, batch_first=True)
        self.mlp_head = nn.Sequential(_linear(2 * h, 2 * h), nn.ReLU(), _linear(2 * h, d))

    @classmethod
    def completed(cls, config: PromptEncoderConfig, model: nn.Module) -> Any:
        config = super().completed(config, model)
        return dataclasses.replace(config, encoder_hidden_size=config.encoder_hidden_size or config.token_dim)

    @torch.no_grad()
    def reset_parameters(self, model: nn.Module) -> None:
        normal_(self.vectors)
        for encoder in (self.lstm_head, self.mlp_head):
            if encoder is not None:
                module_(encoder)

    def encoded(self) -> Tensor:
        if self.mlp_head is None:
            return self.vectors
        hidden = self.vectors if self.lstm_head is None else self.lstm_head(self.vectors)[0]
        return self.mlp_head(hidden)

    def has_encoder(self) -> bool:
        return self.mlp_head is not None

    def drop_encoder(self, encoded: Tensor) -> None:
        self.lstm_head = self.mlp_head = None
        self.embedding = embedding_of(encoded.to(self.vectors)).requires_grad_(False)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return without_values(nn.Linear, inputs, outputs)
