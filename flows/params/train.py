"""Section `train` of params.yaml: objective, batches, optimiser, schedule, and faults."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from flows.params.grpo import Grpo
from flows.params.section import (
    MODEL,
    Confidence,
    Count,
    NonNegative,
    Positive,
    Probability,
    Section,
    Share,
    invalid_value,
)

OnOutOfMemory = Literal["split", "stop"]
OnBadLoss = Literal["stop", "rollback"]

VERSION = r"v\d+\.\d+\.\d+"
"""Pattern of a registered version."""
KINDS = {
    "sft": ("chat", "text"),
    "dpo": ("preference",),
    "orpo": ("preference",),
    "simpo": ("preference",),
    "kto": ("unpaired_preference",),
    "grpo": ("chat",),
    "classification": ("classification",),
    "token_classification": ("token_classification",),
    "seq2seq": ("seq2seq",),
    "reward": ("preference",),
    "embedding": ("retrieval",),
    "reranker": ("retrieval",),
}
"""{train.objective: the data.kind that it accepts}"""
SEQUENCE_CLASSIFIERS = ("classification", "reward", "reranker")
"""Objectives whose model has outputs for a whole text."""
WITH_CLASSES = ("classification", "token_classification")
"""Objectives whose classes the prepare stage finds in the data."""
WITHOUT_TEXT = (*SEQUENCE_CLASSIFIERS, "token_classification", "embedding")
"""Objectives whose models generate no text."""
WITHOUT_CHAT = (*WITHOUT_TEXT, "seq2seq")
"""Objectives whose models cannot answer chats."""


class Preference(Section):
    """Options of the objectives dpo, orpo and simpo."""

    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    beta: Positive = 0.1
    gamma: NonNegative = 0.5
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    length_normalized: bool = False
    rpo_alpha: NonNegative = 0.0
    precompute_reference: bool = True

    @model_validator(mode="after")
    def _check_label_smoothing(self) -> Self:
        if self.label_smoothing and self.loss != "sigmoid":
            raise invalid_value("it is for the sigmoid loss; give 0", "label_smoothing", self.label_smoothing)
        return self


class Kto(Section):
    """Options of the objective kto."""

    loss: Literal["kto", "apo_zero_unpaired"] = "kto"
    beta: Positive = 0.1
    desirable_weight: NonNegative = 1.0
    undesirable_weight: NonNegative = 1.0

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        if not self.desirable_weight + self.undesirable_weight:
            expected = "desirable_weight and undesirable_weight are both 0; give at least one above 0"
            raise invalid_value(expected, "desirable_weight", self.desirable_weight)
        return self


class Distillation(Section):
    """Teacher of the objective sft: the base, a registered version of the same base, or another model."""

    teacher: str | None = None
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    weight: Positive = 0.1
    nll_weight: NonNegative = 1.0
    temperature: Positive = 1.0
    beta: Confidence = 0.5
    on_policy: Probability = 0.0
    max_new_tokens: Count = 128

    @model_validator(mode="after")
    def _check_on_policy(self) -> Self:
        if self.on_policy and self.teacher is None:
            expected = "answers that the model samples are learned from a teacher, and there is none; give 0"
            raise invalid_value(expected, "on_policy", self.on_policy)
        return self

    @field_validator("teacher")
    @classmethod
    def _check_teacher(cls, teacher: str | None) -> str | None:
        if teacher is None or teacher == "base" or re.fullmatch(VERSION, teacher) or re.fullmatch(MODEL, teacher):
            return teacher
        raise invalid_value(
            "give base, a registered version such as v0.1.0, another model as hub:NAME, path:FOLDER or "
            "wheel:NAME==VERSION, or null"
        )

    @property
    def version(self) -> str | None:
        """The registered version that is the teacher; None for another teacher, or without one."""
        return self.teacher if self.teacher is not None and re.fullmatch(VERSION, self.teacher) else None


class Classification(Section):
    """Options of the objective classification."""

    class_weights: Literal["none", "balanced"] = "none"


class TokenClassification(Section):
    """Options of the objective token_classification."""

    class_weights: Literal["none", "balanced"] = "none"


class RewardModel(Section):
    """Options of the objective reward."""

    center_rewards_coefficient: NonNegative = 0.0


class Embedding(Section):
    """Options of the objective embedding."""

    pooling: Literal["mean", "cls", "last"] = "mean"
    normalize: bool = True
    scale: Positive = 20.0
    symmetric: bool = False
    mask_false_negatives: bool = True
    rows_at_once: Count | None = None


class Reranker(Section):
    """Options of the objective reranker."""

    loss: Literal["softmax", "binary"] = "softmax"
    negatives: Count = 4


class Train(Section):
    """Options of a training run."""

    objective: Literal[
        "sft",
        "dpo",
        "orpo",
        "simpo",
        "kto",
        "grpo",
        "classification",
        "token_classification",
        "seq2seq",
        "reward",
        "embedding",
        "reranker",
    ] = "sft"
    preference: Preference = Preference()
    kto: Kto = Kto()
    grpo: Grpo = Grpo()
    distillation: Distillation = Distillation()
    classification: Classification = Classification()
    token_classification: TokenClassification = TokenClassification()
    reward: RewardModel = RewardModel()
    embedding: Embedding = Embedding()
    reranker: Reranker = Reranker()
    epochs: Positive = 1.0
    batch_size: Count = 8
    gradient_accumulation: Count = 2
    processes: Count = 1
    nodes: Count = 1
    launcher: Literal["accelerate", "torchrun"] = "accelerate"
    batching: Literal["grouped", "padded", "padding_free", "packed"] = "grouped"
    pack_tokens: Count = 512
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    learning_rate: Positive = 5e-4
    warmup_share: Share = 0.05
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    weight_decay: NonNegative = 0.0
    max_grad_norm: Positive = 1.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    gradient_checkpointing: Literal["none", "selective", "blocks", "offload"] = "none"
    evaluations: Count = 5
    patience: Count = 3
    save_checkpoints: Count = 2
    on_out_of_memory: OnOutOfMemory = "split"
    on_bad_loss: OnBadLoss = "stop"
    spike_deviations: Positive | None = 10.0
    spike_window: Annotated[int, Field(ge=4)] = 50
    max_rollbacks: Count = 3
    max_steps: Count | None = None
    start_from: Annotated[str, Field(pattern=rf"^{VERSION}$")] | None = None

    @model_validator(mode="after")
    def _check_teacher(self) -> Self:
        if self.distillation.teacher is not None and self.objective != "sft":
            expected = f"a teacher is for the objective sft, and the objective is {self.objective}; give null"
            raise invalid_value(expected, "distillation.teacher", self.distillation.teacher)
        return self

    @model_validator(mode="after")
    def _check_kto_batch(self) -> Self:
        if self.objective == "kto" and self.kto.loss == "kto" and self.batch_size < 2:
            expected = "kto compares a prompt with the answers of other rows of its batch; give 2 or more"
            raise invalid_value(expected, "batch_size", self.batch_size)
        return self

    @model_validator(mode="after")
    def _check_embedding_batch(self) -> Self:
        if self.objective == "embedding" and self.batch_size < 2:
            expected = "the passages of a batch's other rows are a query's negatives; give 2 or more, better 32 or more"
            raise invalid_value(expected, "batch_size", self.batch_size)
        return self

    @model_validator(mode="after")
    def _check_rewards(self) -> Self:
        if self.objective == "grpo" and not self.grpo.rewards:
            expected = (
                "grpo learns from rewards; give at least one, such as [{scorer: 'data/rewards.py:FUNCTION'}], a "
                "function of (prompt, answer, reference, row) that returns a number"
            )
            raise invalid_value(expected, "grpo.rewards", self.grpo.rewards)
        return self

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def _from_bool(cls, value: Any) -> Any:
        return {True: "blocks", False: "none"}[value] if isinstance(value, bool) else value

    @property
    def all_processes(self) -> int:
        """Training processes of all nodes together (count)."""
        return self.processes * self.nodes
