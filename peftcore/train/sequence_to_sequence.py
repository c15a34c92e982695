"""A Trainer for encoder-decoders: cross entropy of the target's tokens, given the source.

    loss = −Σ_e w_e Σ_t log softmax(z_et)[y_et] / Σ_e w_e n_e

w_e: weight of row e. y: tokens of the target, which the decoder predicts from the earlier ones and from the encoded
source. n_e: their number. z: logits.

Shapes: E rows, S positions of the source, T positions of the target, V vocabulary, n target tokens of the batch.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer

from peftcore.errors import TrainingError
from peftcore.train.batches import WEIGHT
from peftcore.train.example_objective import ExampleObjective
from peftcore.train.losses import IGNORED
from peftcore.train.trainer import AdapterTrainerMixin


def target_logits(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the logits (n, V) of the target's tokens, in float32 or wider, and their mask (E, T).

    Args:
        model: An encoder-decoder.
        inputs: A batch with `input_ids` and `attention_mask` (E, S), and `labels` (E, T), -100 after a target's end.

    Raises:
        TrainingError: The model returns no logits for each position of the target.
    """
    labels = inputs["labels"]
    arguments = {name: value for name, value in inputs.items() if name != WEIGHT}
    config = getattr(model, "config", None) or getattr(getattr(model, "module", None), "config", None)
    if not getattr(config, "is_encoder_decoder", True):
        raise TrainingError(f"{type(model).__name__} has no encoder and decoder; load AutoModelForSeq2SeqLM")
    logits = model(**arguments).logits  # with the labels, the model makes the decoder's input from them
    if logits.dim() != 3 or logits.shape[:2] != labels.shape:
        raise TrainingError(
            f"{type(model).__name__} returns logits of shape {tuple(logits.shape)} for labels of shape "
            f"{tuple(labels.shape)}; an encoder-decoder returns (rows, positions, vocabulary): load "
            "AutoModelForSeq2SeqLM"
        )
    mask = (labels != IGNORED).to(logits.device)
    logits = logits[mask]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)), mask


class SequenceToSequenceObjective(ExampleObjective):
    """Weighted cross entropy of the targets' tokens."""

    collator_name = "SequenceToSequenceCollator"

    def columns(self, signature: list[str]) -> list[str]:
        """Return the columns of sources with targets."""
        return ["input_ids", "labels", WEIGHT]

    def example_weights(self, inputs: dict[str, Any]) -> Tensor:
        """Return each row's weight times its number of target tokens, (E,)."""
        return super().example_weights(inputs) * (inputs["labels"] != IGNORED).sum(1)

    def example_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the rows' mean cross entropies (E,) in nats per token of the target."""
        return target_losses(model, inputs), {}


def target_losses(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Return the mean cross entropy (nats per token) of each row's target, (E,). See `target_logits`."""
    logits, mask = target_logits(model, inputs)
    losses = F.cross_entropy(logits, inputs["labels"].to(mask.device)[mask], reduction="none")
    sums = losses.new_zeros(len(mask)).index_add(0, mask.nonzero()[:, 0], losses)
    return sums / mask.sum(1).clamp(min=1)


class SequenceToSequenceTrainerMixin(AdapterTrainerMixin):
    """Encoder-decoders for any Trainer class: `class MyTrainer(SequenceToSequenceTrainerMixin, Trainer): ...`.

    The arguments are those of AdapterTrainerMixin.

    Raises:
        TrainingError: The rows are packed, or the model is no encoder-decoder.
    """

    loss_is_scaled_for_ga = True

    def make_objective(self) -> SequenceToSequenceObjective:
        """Return the weighted cross entropy of targets."""
        return SequenceToSequenceObjective(self)


class SequenceToSequenceTrainer(SequenceToSequenceTrainerMixin, Trainer):
    """transformers' Trainer for a PeftModel over an encoder-decoder, with LoRA's task SEQ_2_SEQ_LM."""
