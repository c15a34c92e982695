"""Sections `register` and `gate` of params.yaml."""

from typing import Annotated, ClassVar

from pydantic import Field

from flows.params.section import Confidence, Finite, Name, NonNegative, Positive, Probability, Section, Text, Whole


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
    max_adapter_mb: Positive | None = None
    max_first_token_ms: Positive | None = None
    max_token_ms: Positive | None = None
    max_slowdown: Positive | None = None
    allowed_signers: Text | None = None
    approvals: Whole = 0
    champion: Champion = Champion()
    slices: Slices = Slices()
