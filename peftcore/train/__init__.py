"""Adapter training: trainers on top of transformers' Trainer, and their parts for other training loops."""

# ruff: noqa: E402 (the check has to come before the imports that need the packages)
from peftcore.errors import require_extra

require_extra("train", "peftcore.train", "accelerate")

from peftcore.train.adamw import FusedAdamW
from peftcore.train.batches import (
    WEIGHT,
    ClassificationCollator,
    LengthGroupedSampler,
    PreferenceCollator,
    RightPaddingCollator,
    UnpairedPreferenceCollator,
    mismatched_answers,
)
from peftcore.train.checkpoints import fault_of_checkpoint, last_good_checkpoint
from peftcore.train.classification import (
    ClassificationTrainer,
    ClassificationTrainerMixin,
    balanced_class_weights,
    macro_f1,
)
from peftcore.train.distillation import Distillation, DistillationTrainer, DistillationTrainerMixin
from peftcore.train.divergence import token_divergences
from peftcore.train.fault_policy import FaultPolicy
from peftcore.train.grpo import Grpo
from peftcore.train.grpo_trainer import GrpoTrainer, GrpoTrainerMixin
from peftcore.train.kto import Kto, kto_reference_point, kto_weight_range
from peftcore.train.kto_trainer import UNPAIRED_COLUMNS, KtoTrainer, KtoTrainerMixin
from peftcore.train.linear_cross_entropy import linear_cross_entropy
from peftcore.train.losses import row_sums, supervised_positions, token_losses
from peftcore.train.on_policy import OnPolicy
from peftcore.train.packing import PackedCollator, Packs, PackSampler, check_packable
from peftcore.train.preference import Dpo, Orpo, PairLogProbs, PreferenceObjective, SimPo
from peftcore.train.preference_trainer import PAIR_COLUMNS, PreferenceTrainer, PreferenceTrainerMixin
from peftcore.train.rank_search import RankSearch, find_ranks
from peftcore.train.recomputation import SELECTED, Mode, recompute_activations
from peftcore.train.reference import pair_log_probs, reference_acting, reference_model, row_log_probs, shared_copy
from peftcore.train.rewards import Reward, Rewards
from peftcore.train.sampling import PromptCollator, Sampling
from peftcore.train.supervised_head import supervised_logits
from peftcore.train.trainer import AdapterTrainer, AdapterTrainerMixin

__all__ = [
    "PAIR_COLUMNS",
    "SELECTED",
    "UNPAIRED_COLUMNS",
    "WEIGHT",
    "AdapterTrainer",
    "AdapterTrainerMixin",
    "ClassificationCollator",
    "ClassificationTrainer",
    "ClassificationTrainerMixin",
    "Distillation",
    "DistillationTrainer",
    "DistillationTrainerMixin",
    "Dpo",
    "FaultPolicy",
    "FusedAdamW",
    "Grpo",
    "GrpoTrainer",
    "GrpoTrainerMixin",
    "Kto",
    "KtoTrainer",
    "KtoTrainerMixin",
    "LengthGroupedSampler",
    "Mode",
    "OnPolicy",
    "Orpo",
    "PackSampler",
    "PackedCollator",
    "Packs",
    "PairLogProbs",
    "PreferenceCollator",
    "PreferenceObjective",
    "PreferenceTrainer",
    "PreferenceTrainerMixin",
    "PromptCollator",
    "RankSearch",
    "Reward",
    "Rewards",
    "RightPaddingCollator",
    "Sampling",
    "SimPo",
    "UnpairedPreferenceCollator",
    "balanced_class_weights",
    "check_packable",
    "fault_of_checkpoint",
    "find_ranks",
    "kto_reference_point",
    "kto_weight_range",
    "last_good_checkpoint",
    "linear_cross_entropy",
    "macro_f1",
    "mismatched_answers",
    "pair_log_probs",
    "recompute_activations",
    "reference_acting",
    "reference_model",
    "row_log_probs",
    "row_sums",
    "shared_copy",
    "supervised_logits",
    "supervised_positions",
    "token_divergences",
    "token_losses",
]
