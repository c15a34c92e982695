"""Group relative policy optimisation (GRPO), arXiv:2402.03300: advantages of sampled answers, and their loss.

A prompt gets a group of G sampled answers. r: reward of an answer. Every token of an answer has the answer's advantage:

    A = (r − mean of the group) / (s + 1e-4)

s: standard deviation of the rewards of the group, or of the whole batch (arXiv:2508.08221). Dr. GRPO does not divide
(arXiv:2503.20783).

π: the model. π_old: the model that sampled the answers. ρ: the reference. The loss of a token:

    w = π / π_old
    ℓ = −min(w A, clip(w, 1 − ε, 1 + ε_high) A) + β w (ρ/π − log(ρ/π) − 1)

The last term estimates KL(π ‖ ρ). Its factor w is 1 for new answers, but has a gradient, with which the term's gradient
is that of the divergence (arXiv:2512.02556); GRPO as first published is without it. The loss of an optimiser step over
N answers of n_i tokens:

    grpo      1/N Σ_i 1/n_i Σ_t ℓ_it
    bnpo      Σ_i Σ_t ℓ_it / Σ_i n_i           arXiv:2503.14476, eq. 8; TRL's `bnpo`, with accumulation `dapo`
    dr_grpo   1/N Σ_i 1/L Σ_t ℓ_it             L: maximum tokens of an answer

Shapes: P prompts, G answers of each, n tokens.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from peftcore.errors import ConfigError

GrpoLoss = Literal["grpo", "dr_grpo", "bnpo"]
RewardScale = Literal["group", "batch", "none"]

_LEAST_SCALE = 1e-4
"""Added to the standard deviation of rewards, as in TRL."""


@dataclass(frozen=True)
class Grpo:
    """Options of GRPO.

    Raises:
        ConfigError: A value is out of range.
    """

    group_size: int = 8
    """Sampled answers of each prompt, G, at least 2."""
    beta: float = 0.0
    """Factor of the KL divergence from the reference, β, at least 0. 0: no reference is computed."""
    epsilon: float = 0.2
    """Clipping range of the probability ratio below 1, above 0 and below 1."""
    epsilon_high: float | None = None
    """Clipping range above 1, above 0. None: epsilon."""
    loss_type: GrpoLoss = "grpo"
    scale_rewards: RewardScale = "group"
    """Standard deviation by which advantages are divided: of the group, of the batch, or none."""
    use_bias_correction_kl: bool = True
    """Multiply the KL term by the probability ratio."""
    iterations: int = 1
    """Optimiser steps on each batch of sampled answers. With 1, the ratio is 1 and nothing is clipped."""

    def __post_init__(self) -> None:
        for name, choices in (("loss_type", GrpoLoss), ("scale_rewards", RewardScale)):
            if getattr(self, name) not in get_args(choices):
                raise ConfigError(f"{name} must be one of {', '.join(get_args(choices))}; got {getattr(self, name)!r}")
        for name, least in (("group_size", 2), ("iterations", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}; got {getattr(self, name)}")
        if not self.beta >= 0:
            raise ConfigError(f"beta must be at least 0; got {self.beta}")
        if not 0 < self.epsilon < 1:
            raise ConfigError(f"epsilon must be above 0 and below 1; got {self.epsilon}")
        if self.epsilon_high is not None and not self.epsilon_high > 0:
            raise ConfigError(f"epsilon_high must be above 0; got {self.epsilon_high}")

    @property
    def uses_reference(self) -> bool:
        """True if the loss needs the reference's log-probabilities."""
        return self.beta > 0

    def advantages(self, rewards: Tensor, batch_deviation: Tensor | None = None) -> Tensor:
        """Return the advantages of groups, (P, G).

        Args:
            rewards: Rewards of the groups, (P, G).
            batch_deviation: Standard deviation of the rewards of all groups of the optimiser step, a scalar, for
                scale_rewards="batch". None: that of `rewards`.
        """
        differences = rewards - rewards.mean(1, keepdim=True)
        if self.scale_rewards == "none":
            return differences
        if self.scale_rewards == "group":
            return differences / (rewards.std(1, keepdim=True) + _LEAST_SCALE)
        return differences / ((rewards.std() if batch_deviation is None else batch_deviation) + _LEAST_SCALE)

    def clipped(self, log_probs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
        """Return a mask (n,): true where clipping makes the gradient 0. The arguments are those of `token_losses`."""
        ratios = (log_probs - old).exp()
        low, high = self._range
        return ((ratios < low) & (advantages < 0)) | ((ratios > high) & (advantages > 0))

    def token_losses(
        self, log_probs: Tensor, old: Tensor, advantages: Tensor, reference: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of each token, and the estimate of its KL divergence from the reference, each (n,).

        Args:
            log_probs: Log-probabilities of the tokens, log π, (n,) in nats.
            old: Those of the model that sampled them, (n,) without gradients.
            advantages: Advantage of each token's answer, (n,).
            reference: Log-probabilities of the reference, (n,) without gradients. None: no KL term, whose estimate
                is then 0.
        """
        ratios = (log_probs - old).exp()
        low, high = self._range
        losses = -torch.minimum(ratios * advantages, ratios.clamp(low, high) * advantages)
        if reference is None:
            return losses, torch.zeros_like(losses)
        differences = reference - log_probs
        divergences = differences.exp() - differences - 1
        if self.use_bias_correction_kl:
            divergences = divergences * ratios
        return losses + self.beta * divergences, divergences

    @property
    def _range(self) -> tuple[float, float]:
        return 1 - self.epsilon, 1 + (self.epsilon if self.epsilon_high is None else self.epsilon_high)
