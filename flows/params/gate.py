"""Sections `register` and `gate` of params.yaml."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from flows.params.judge import Judge
from flows.params.section import (
    Confidence,
    Count,
    Finite,
    Name,
    NonNegative,
    Positive,
    Probability,
    Section,
    Text,
    Whole,
    invalid_value,
)

Direction = Literal["higher", "lower"]
_ANSWERS: Mapping[str, Direction] = {"rouge_l": "higher", "ended": "higher"}
_PAIRS: Mapping[str, Direction] = {"loss": "lower", **_ANSWERS, "accuracy": "higher", "margin": "higher"}
RANKING: Mapping[str, Direction] = {
    "recall_at_1": "higher",
    "recall_at_5": "higher",
    "recall_at_10": "higher",
    "mrr_at_10": "higher",
    "ndcg_at_10": "higher",
}
FIGURES: Mapping[str, Mapping[str, Direction]] = {
    "sft": {"loss": "lower", **_ANSWERS},
    "dpo": _PAIRS,
    "orpo": _PAIRS,
    "simpo": _PAIRS,
    "kto": _PAIRS,
    "grpo": {"loss": "lower", **_ANSWERS, "reward": "higher"},
    "classification": {"loss": "lower", "accuracy": "higher"},
    "token_classification": {"loss": "lower", "entity_f1": "higher"},
    "seq2seq": {"loss": "lower", **_ANSWERS},
    "reward": {"loss": "lower", "accuracy": "higher", "margin": "higher"},
    "embedding": {"loss": "lower", **RANKING},
    "reranker": {"loss": "lower", **RANKING},
}
"""{objective: {figure that its evaluation has for each row: the better direction}}; `ended` is the EOS rate."""

DIVERGENCE = "divergence"
"""Figure of the objective sft with a teacher; lower is better."""


class Register(Section):
    """Remotes and signing key of a registration."""

    remote: Annotated[str, Field(pattern=r"^\w[\w.-]*$", min_length=1)] = "local"
    git_remote: Annotated[str, Field(pattern=r"^[^-\s]\S*$")] | None = None
    signing_key: Text | None = None


class Champion(Section):
    """Comparison of a candidate with the champion."""

    renamed: ClassVar = {"remeasure": "gate.champion.reevaluate"}

    confidence: Confidence = 0.95
    resamples: Annotated[int, Field(ge=100)] = 10_000
    max_loss_regression: NonNegative = 0.0
    max_loss_regression_on_its_rows: Positive | None = 0.1
    reevaluate: bool = True


class Slices(Section):
    """Comparison with the champion on each slice of the test rows."""

    max_loss_regression: NonNegative | None = 0.2
    confidence: Confidence = 0.95
    min_rows: Annotated[int, Field(ge=2)] = 10


class LookSequence(Section):
    """Control of the error over a sequence of candidates; alpha None: each one is compared at the same confidence."""

    alpha: Confidence | None = None
    spending: Literal["even", "decreasing"] = "even"
    looks: Count = 52
    scope: Literal["project", "test_rows"] = "project"


class Rule(Section):
    """Limits on one metric of the evaluation: a figure of `FIGURES`, or a scorer of evaluate.scorers."""

    metric: Text
    direction: Direction = "higher"
    limit: Finite | None = None
    gain: Finite | None = None
    bound: Finite | None = None
    slice_bound: NonNegative | None = None

    @model_validator(mode="after")
    def _check_some_limit(self) -> Self:
        if self.limit is None and self.gain is None and self.bound is None and self.slice_bound is None:
            raise invalid_value("give at least one of limit, gain, bound and slice_bound", "metric", self.metric)
        return self

    @property
    def compares(self) -> bool:
        """True if the rule compares the candidate with the champion."""
        return self.bound is not None or self.slice_bound is not None


class Gate(Section):
    """Limits that a version must meet before promotion; None means no limit."""

    renamed: ClassVar = {"min_ended": "gate.min_eos_rate"}

    stage: Name = "champion"
    max_test_loss: Positive | None = None
    min_loss_gain: Finite | None = 0.5
    min_rouge_l_gain: Annotated[float, Field(ge=-1, le=1)] | None = 0.05
    min_eos_rate: Probability | None = 0.9
    min_accuracy: Probability | None = None
    max_forgetting: NonNegative | None = 0.2
    max_new_suite_failures: Whole | None = 0
    max_benchmark_drop: NonNegative | None = None
    max_calibration_error: Probability | None = None
    max_adapter_mb: Positive | None = None
    max_first_token_ms: Positive | None = None
    max_token_ms: Positive | None = None
    max_slowdown: Positive | None = None
    allowed_signers: Text | None = None
    approvals: Whole = 0
    champion: Champion = Champion()
    sequence: LookSequence = LookSequence()
    slices: Slices = Slices()
    rules: list[Rule] = Field(default=[])
    judge: Judge = Judge()

    @model_validator(mode="after")
    def _check_one_rule_per_metric(self) -> Self:
        metrics = [rule.metric for rule in self.rules]
        for index, metric in enumerate(metrics):
            if metric in metrics[:index]:
                raise invalid_value("another rule has this metric; put both into one", f"rules.{index}.metric", metric)
        return self
