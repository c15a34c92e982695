"""Losses of single answers that are marked as desirable or undesirable: KTO, and APO-zero for unpaired answers.

π(y|x): the model's probability of an answer. ρ(y|x): the reference's. y': the answer to another prompt.

    r = log π(y|x) − log ρ(y|x)
    z = max(0, mean over examples of log π(y'|x) − log ρ(y'|x))
    KTO       λ_D (1 − σ(β(r − z))) of a desirable answer, λ_U (1 − σ(β(z − r))) of an undesirable one
                                                              arXiv:2402.01306, eq. 7
    APO-zero  KTO with z = 0                                  arXiv:2408.06266

z, the reference point, estimates the KL divergence of the model from the reference. No gradient flows through z.

Shapes: E examples.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from peftcore.errors import ConfigError

KtoLoss = Literal["kto", "apo_zero_unpaired"]


@dataclass(frozen=True)
class Kto:
    """KTO or APO-zero loss of unpaired answers.

    Raises:
        ConfigError: A value is out of range.
    """

    beta: float = 0.1
    """Strength of the KL penalty against the reference, above 0."""
    loss: KtoLoss = "kto"
    desirable_weight: float = 1.0
    """Factor of the losses of desirable answers, λ_D, at least 0."""
    undesirable_weight: float = 1.0
    """Factor of the losses of undesirable answers, λ_U, at least 0."""

    def __post_init__(self) -> None:
        if self.loss not in get_args(KtoLoss):
            raise ConfigError(f"loss must be one of {', '.join(get_args(KtoLoss))}; got {self.loss!r}")
        if not self.beta > 0:
            raise ConfigError(f"beta must be above 0; got {self.beta}")
        for name in ("desirable_weight", "undesirable_weight"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must be at least 0; got {getattr(self, name)}")
        if not self.desirable_weight + self.undesirable_weight:
            raise ConfigError("desirable_weight and undesirable_weight are both 0; give at least one above 0")

    @property
    def uses_reference_point(self) -> bool:
        """True if the loss needs the log-probabilities of answers to other prompts."""
        return self.loss == "kto"

    def losses(self, log_ratios: Tensor, desirable: Tensor, reference_point: Tensor) -> Tensor:
        """Return losses (E,).

        Args:
            log_ratios: r of each answer, (E,) in nats.
            desirable: True for a desirable answer, (E,).
            reference_point: z, a scalar of at least 0; see `kto_reference_point`. Not used by APO-zero.
        """
        gains = self.gains(log_ratios, desirable, reference_point)
        weights = torch.where(
            desirable, log_ratios.new_tensor(self.desirable_weight), log_ratios.new_tensor(self.undesirable_weight)
        )
        return weights * (1 - torch.sigmoid(self.beta * gains))

    def gains(self, log_ratios: Tensor, desirable: Tensor, reference_point: Tensor) -> Tensor:
        """Return r − z of desirable answers and z − r of undesirable ones, (E,) in nats; above 0 is correct."""
        differences = log_ratios - reference_point if self.uses_reference_point else log_ratios
        return torch.where(desirable, differences, -differences)


def kto_reference_point(log_ratios: Tensor) -> Tensor:
    """Return z, a scalar, from the log-ratios of answers to other prompts, (E,) in nats; 0 without any."""
    return log_ratios.mean().clamp(min=0).detach() if len(log_ratios) else log_ratios.new_zeros(())


def kto_weight_range(desirable: int, undesirable: int, other_weight: float = 1.0) -> tuple[float, float]:
    """Return the lowest and highest weight of desirable answers that balance the two kinds (arXiv:2402.01306, eq. 8).

    Args:
        desirable: Number of desirable answers, above 0.
        undesirable: Number of undesirable answers.
        other_weight: Weight of undesirable answers.
    """
    balance = undesirable * other_weight / desirable
    return balance, 4 / 3 * balance
