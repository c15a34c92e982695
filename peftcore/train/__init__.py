"""Training adapters: transformers' Trainer with what adapters need, and the pieces by themselves."""

from peftcore.train.batches import LengthGroupedSampler, RightPaddingCollator
from peftcore.train.checkpoints import fault_of_checkpoint, last_good_checkpoint
from peftcore.train.losses import row_sums, supervised_logits, supervised_positions, token_losses
from peftcore.train.trainer import AdapterTrainer, AdapterTrainerMixin

__all__ = [
    "AdapterTrainer",
    "AdapterTrainerMixin",
    "LengthGroupedSampler",
    "RightPaddingCollator",
    "fault_of_checkpoint",
    "last_good_checkpoint",
    "row_sums",
    "supervised_logits",
    "supervised_positions",
    "token_losses",
]
