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
    SequenceToSequenceCollator,
    TokenClassificationCollator,
    UnpairedPreferenceCollator,
    mismatched_answers,
)
from peftcore.train.best_of_n import Candidates, Reward, best_of_n, divergence_bound, expected_best
from peftcore.train.checkpoints import fault_of_checkpoint, last_good_checkpoint
from peftcore.train.classification import (
    ClassificationTrainer,
    ClassificationTrainerMixin,
    balanced_class_weights,
    macro_f1,
)
from peftcore.train.contrastive import Contrastive, Pooling, false_negatives, pool
from peftcore.train.distillation import Distillation, DistillationTrainer, DistillationTrainerMixin
from peftcore.train.divergence import token_divergences
from peftcore.train.embedding import (
    RETRIEVAL_COLUMNS,
    EmbeddingCollator,
    EmbeddingTrainer,
    EmbeddingTrainerMixin,
    embed,
    evaluate_texts,
)
from peftcore.train.entities import (
    OUTSIDE,
    Entity,
    EntityCounts,
    TagScheme,
    entities,
    entity_counts,
    is_bio_tag,
    summed_counts,
)
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
from peftcore.train.ranking import RANKING_METRICS, ranking_metrics, ranks, retrieval_ranks
from peftcore.train.recomputation import SELECTED, Mode, recompute_activations
from peftcore.train.reference import pair_log_probs, reference_acting, reference_model, row_log_probs, shared_copy
from peftcore.train.reranking import (
    PAIRS_COLUMN,
    TYPES_COLUMN,
    RerankingCollator,
    RerankingTrainer,
    RerankingTrainerMixin,
    passage_scores,
    reranking_losses,
)
from peftcore.train.reward import BradleyTerry, pair_rewards, sequence_rewards
from peftcore.train.reward_model import RewardModel, check_reward_adapter
from peftcore.train.reward_trainer import MARGIN, REWARD_COLUMNS, RewardCollator, RewardTrainer, RewardTrainerMixin
from peftcore.train.rewards import Rewards, RowReward
from peftcore.train.sampling import PromptCollator, Sampling
from peftcore.train.sequence_to_sequence import (
    SequenceToSequenceTrainer,
    SequenceToSequenceTrainerMixin,
    target_logits,
    target_losses,
)
from peftcore.train.supervised_head import supervised_logits
from peftcore.train.token_classification import (
    TokenClassificationTrainer,
    TokenClassificationTrainerMixin,
    labelled_logits,
)
from peftcore.train.trainer import AdapterTrainer, AdapterTrainerMixin

__all__ = [
    "MARGIN",
    "OUTSIDE",
    "PAIRS_COLUMN",
    "PAIR_COLUMNS",
    "RANKING_METRICS",
    "RETRIEVAL_COLUMNS",
    "REWARD_COLUMNS",
    "SELECTED",
    "TYPES_COLUMN",
    "UNPAIRED_COLUMNS",
    "WEIGHT",
    "AdapterTrainer",
    "AdapterTrainerMixin",
    "BradleyTerry",
    "Candidates",
    "ClassificationCollator",
    "ClassificationTrainer",
    "ClassificationTrainerMixin",
    "Contrastive",
    "Distillation",
    "DistillationTrainer",
    "DistillationTrainerMixin",
    "Dpo",
    "EmbeddingCollator",
    "EmbeddingTrainer",
    "EmbeddingTrainerMixin",
    "Entity",
    "EntityCounts",
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
    "Pooling",
    "PreferenceCollator",
    "PreferenceObjective",
    "PreferenceTrainer",
    "PreferenceTrainerMixin",
    "PromptCollator",
    "RankSearch",
    "RerankingCollator",
    "RerankingTrainer",
    "RerankingTrainerMixin",
    "Reward",
    "RewardCollator",
    "RewardModel",
    "RewardTrainer",
    "RewardTrainerMixin",
    "Rewards",
    "RightPaddingCollator",
    "RowReward",
    "Sampling",
    "SequenceToSequenceCollator",
    "SequenceToSequenceTrainer",
    "SequenceToSequenceTrainerMixin",
    "SimPo",
    "TagScheme",
    "TokenClassificationCollator",
    "TokenClassificationTrainer",
    "TokenClassificationTrainerMixin",
    "UnpairedPreferenceCollator",
    "balanced_class_weights",
    "best_of_n",
    "check_packable",
    "check_reward_adapter",
    "divergence_bound",
    "embed",
    "entities",
    "entity_counts",
    "evaluate_texts",
    "expected_best",
    "false_negatives",
    "fault_of_checkpoint",
    "find_ranks",
    "is_bio_tag",
    "kto_reference_point",
    "kto_weight_range",
    "labelled_logits",
    "last_good_checkpoint",
    "linear_cross_entropy",
    "macro_f1",
    "mismatched_answers",
    "pair_log_probs",
    "pair_rewards",
    "passage_scores",
    "pool",
    "ranking_metrics",
    "ranks",
    "recompute_activations",
    "reference_acting",
    "reference_model",
    "reranking_losses",
    "retrieval_ranks",
    "row_log_probs",
    "row_sums",
    "sequence_rewards",
    "shared_copy",
    "summed_counts",
    "supervised_logits",
    "supervised_positions",
    "target_logits",
    "target_losses",
    "token_divergences",
    "token_losses",
]
