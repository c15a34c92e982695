"""Training adapters: transformers' Trainer with what adapters need, and the pieces by themselves."""

from peftcore.train.adamw import FusedAdamW
from peftcore.train.batches import LengthGroupedSampler, RightPaddingCollator
from peftcore.train.checkpoints import fault_of_checkpoint, last_good_checkpoint
from peftcore.train.linear_cross_entropy import linear_cross_entropy
from peftcore.train.losses import row_sums, supervised_positions, token_losses
from peftcore.train.packing import PackedCollator, Packs, PackSampler, check_packable
from peftcore.train.supervised_head import supervised_logits
from peftcore.train.trainer import AdapterTrainer, AdapterTrainerMixin

__all__ = [
    "AdapterTrainer",
    "AdapterTrainerMixin",
    "FusedAdamW",
    "LengthGroupedSampler",
    "PackSampler",
    "PackedCollator",
    "Packs",
    "RightPaddingCollator",
    "check_packable",
    "fault_of_checkpoint",
    "last_good_checkpoint",
    "linear_cross_entropy",
    "row_sums",
    "supervised_logits",
    "supervised_positions",
    "token_losses",
]
