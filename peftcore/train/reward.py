"""Loss of a reward model on preference pairs: Bradley-Terry, optionally with margins and centred rewards.

r(x, y): the reward of answer y to prompt x, the single output of a sequence classifier. y⁺: the chosen answer. y⁻: the
rejected one. m: by how much y⁺ is better. c: a coefficient.

    loss = −log σ(r(x, y⁺) − r(x, y⁻) − m) + c (r(x, y⁺) + r(x, y⁻))²

The first term is that of arXiv:2203.02155, eq. 1, with the margin of arXiv:2307.09288, eq. 2. The second one keeps the
mean reward near 0 (arXiv:2312.09244, eq. 2). Both are the loss of TRL's RewardTrainer.

Shapes: P pairs, T tokens of the longest answer with its prompt.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.errors import ConfigError, TrainingError
from peftcore.train.batches import with_model_padding

ADVICE = "load AutoModelForSequenceClassification.from_pretrained(..., num_labels=1)"


@dataclass(frozen=True)
class BradleyTerry:
    """Negative log-probability that the chosen answer wins, in nats.

    Raises:
        ConfigError: The coefficient is below 0 or not a number.
    """

    center_rewards_coefficient: float = 0.0
    """Factor of the squared sum of a pair's two rewards, c, at least 0. 0.01 is the paper's."""

    def __post_init__(self) -> None:
        if not self.center_rewards_coefficient >= 0:
            raise ConfigError(f"center_rewards_coefficient must be at least 0; got {self.center_rewards_coefficient}")

    def losses(self, chosen: Tensor, rejected: Tensor, margins: Tensor | None = None) -> Tensor:
        """Return losses (P,).

        Args:
            chosen: Rewards of the chosen answers, (P,).
            rejected: Rewards of the rejected answers, (P,).
            margins: m of each pair, (P,). None: 0.
        """
        differences = chosen - rejected
        losses = -F.logsigmoid(differences if margins is None else differences - margins)
        if self.center_rewards_coefficient:
            losses = losses + self.center_rewards_coefficient * (chosen + rejected).square()
        return losses


def pair_rewards(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the rewards of chosen and rejected answers, each (P,), from one forward.

    Args:
        model: A sequence classifier with one output.
        inputs: `input_ids` and `attention_mask`, (P, 2, T), the chosen answer before the rejected one.

    Raises:
        TrainingError: The model does not have one output for each sequence.
    """
    flat = {name: inputs[name].flatten(0, 1) for name in ("input_ids", "attention_mask")}
    chosen, rejected = sequence_rewards(model, **flat).view(-1, 2).unbind(1)
    return chosen, rejected


def sequence_rewards(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the reward of each sequence, (B,), in float32 or more.

    Args:
        model: A sequence classifier with one output.
        input_ids: Token ids (B, T), padded on the right.
        attention_mask: 1 for tokens and 0 for padding, (B, T).

    Raises:
        TrainingError: The model does not have one output for each sequence.
    """
    inputs = with_model_padding(model, {"input_ids": input_ids, "attention_mask": attention_mask})
    logits = model(**inputs).logits
    if logits.shape != (len(input_ids), 1):
        raise TrainingError(
            f"{type(model).__name__} returns logits of shape {tuple(logits.shape)} for {len(input_ids)} answers; a "
            f"reward model returns one number for each, (answers, 1): {ADVICE}"
        )
    return logits[:, 0].to(torch.promote_types(logits.dtype, torch.float32))
