"""Losses of preference pairs: DPO, cDPO, IPO, hinge and RPO with a reference model, ORPO and SimPO without.

π(y|x): the model's probability of an answer. ρ(y|x): the reference's. y⁺: the chosen answer. y⁻: the rejected one.

    h = log π(y⁺|x)/ρ(y⁺|x) − log π(y⁻|x)/ρ(y⁻|x)
    DPO    −(1 − ε) log σ(βh) − ε log σ(−βh)          arXiv:2305.18290; ε > 0 is cDPO's
    IPO    (h̄ − 1/2β)²                                arXiv:2310.12036, eq. 17
    hinge  max(0, 1 − βh)                             arXiv:2305.10425
    ORPO   −log p̄⁺ − β log σ(log odds p̄⁺ − log odds p̄⁻)   arXiv:2403.07691; β is its λ
    SimPO  −log σ(β (log p̄⁺ − log p̄⁻) − γ)                arXiv:2405.14734, eq. 6

h̄: h with means over an answer's tokens instead of sums. p̄: geometric mean of an answer's token probabilities. Each
loss is per pair; a batch's loss is the weighted mean over pairs.

Shapes: P pairs.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from peftcore.errors import ConfigError

PairLoss = Literal["sigmoid", "ipo", "hinge"]


@dataclass(frozen=True)
class PairLogProbs:
    """Log-probabilities (P,) of both answers in nats, summed over tokens, and the numbers of tokens (P,)."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    def per_token(self) -> "PairLogProbs":
        """Return means over tokens instead of sums; 0 for an answer without tokens."""
        chosen = self.chosen / self.chosen_tokens.clamp(min=1)
        rejected = self.rejected / self.rejected_tokens.clamp(min=1)
        return PairLogProbs(chosen, rejected, self.chosen_tokens, self.rejected_tokens)


class PreferenceObjective(Protocol):
    """Interface of a loss of pairs, such as `Dpo`, `Orpo` and `SimPo`."""

    uses_reference: ClassVar[bool]
    """True if `losses` needs the reference's log-probabilities."""

    def losses(self, policy: PairLogProbs, reference: PairLogProbs | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return losses (P,), and detached metrics (P,) to log, from the log-probabilities of policy and reference."""
        ...


@dataclass(frozen=True)
class Dpo:
    """DPO, cDPO (label_smoothing), IPO or hinge loss, with RPO's additional term if asked for.

    Raises:
        ConfigError: A value is out of range.
    """

    beta: float = 0.1
    """Strength of the KL penalty against the reference, above 0."""
    loss: PairLoss = "sigmoid"
    label_smoothing: float = 0.0
    """Assumed share of pairs with swapped labels, below 0.5. For the sigmoid loss only."""
    length_normalized: bool = False
    """Compare means over tokens, as IPO always does, so that the length of an answer does not matter."""
    rpo_alpha: float = 0.0
    """Weight of the additional mean token loss of the chosen answer (RPO, arXiv:2404.19733)."""
    uses_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.loss not in get_args(PairLoss):
            raise ConfigError(f"loss must be one of {', '.join(get_args(PairLoss))}; got {self.loss!r}")
        _check_beta(self.beta)
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(f"label_smoothing must be at least 0 and below 0.5; got {self.label_smoothing}")
        if self.label_smoothing and self.loss != "sigmoid":
            raise ConfigError(f"label_smoothing is for the sigmoid loss; set it to 0 with loss={self.loss!r}")
        if self.rpo_alpha < 0:
            raise ConfigError(f"rpo_alpha must be at least 0; got {self.rpo_alpha}")

    def losses(self, policy: PairLogProbs, reference: PairLogProbs | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return losses (P,), and detached metrics (P,) under TRL's names."""
        assert reference is not None
        if self.length_normalized or self.loss == "ipo":
            policy_terms, reference_terms = policy.per_token(), reference.per_token()
        else:
            policy_terms, reference_terms = policy, reference
        chosen = policy_terms.chosen - reference_terms.chosen
        rejected = policy_terms.rejected - reference_terms.rejected
        losses = self._loss_of_ratio(chosen - rejected)
        likelihood = -policy.per_token().chosen
        if self.rpo_alpha:
            losses = losses + self.rpo_alpha * likelihood
        metrics = _rewards(self.beta * chosen, self.beta * rejected) | _log_probs(policy)
        return losses, metrics | {"nll": likelihood.detach()}

    def _loss_of_ratio(self, ratio: Tensor) -> Tensor:
        if self.loss == "ipo":
            return (ratio - 1 / (2 * self.beta)).square()
        if self.loss == "hinge":
            return (1 - self.beta * ratio).relu()
        right, wrong = F.logsigmoid(self.beta * ratio), F.logsigmoid(-self.beta * ratio)
        return -(1 - self.label_smoothing) * right - self.label_smoothing * wrong


@dataclass(frozen=True)
class Orpo:
    """ORPO, which needs no reference.

    Raises:
        ConfigError: beta is not above 0.
    """

    beta: float = 0.1
    """Weight of the odds ratio loss, the paper's λ, above 0."""
    uses_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_beta(self.beta)

    def losses(self, policy: PairLogProbs, reference: PairLogProbs | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return losses (P,), and detached metrics (P,) under TRL's names; `reference` is not used."""
        means = policy.per_token()
        ratio = _log_odds(means.chosen) - _log_odds(means.rejected)
        losses = -means.chosen - self.beta * F.logsigmoid(ratio)
        metrics = _rewards(self.beta * means.chosen, self.beta * means.rejected) | _log_probs(policy)
        metrics |= {"nll": -means.chosen.detach(), "log_odds_chosen": ratio.detach()}
        return losses, metrics | {"log_odds_ratio": F.logsigmoid(ratio).detach()}


@dataclass(frozen=True)
class SimPo:
    """SimPO, which needs no reference and compares means over tokens.

    Raises:
        ConfigError: A value is out of range.
    """

    beta: float = 2.0
    """Scale of the difference of mean log-probabilities, above 0."""
    gamma: float = 1.0
    """Margin by which the chosen answer is to win, at least 0."""
    likelihood_weight: float = 0.0
    """Weight of the additional mean token loss of the chosen answer, as CPO has it (arXiv:2401.08417)."""
    uses_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_beta(self.beta)
        for name in ("gamma", "likelihood_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0; got {getattr(self, name)}")

    def losses(self, policy: PairLogProbs, reference: PairLogProbs | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return losses (P,), and detached metrics (P,) under TRL's names; `reference` is not used."""
        means = policy.per_token()
        losses = -F.logsigmoid(self.beta * (means.chosen - means.rejected) - self.gamma)
        if self.likelihood_weight:
            losses = losses - self.likelihood_weight * means.chosen
        metrics = _rewards(self.beta * means.chosen, self.beta * means.rejected) | _log_probs(policy)
        return losses, metrics | {"nll": -means.chosen.detach()}


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise ConfigError(f"beta must be above 0; got {beta}")


def _log_odds(log_probability: Tensor) -> Tensor:
    """Return log p/(1 − p) from log p; finite, and accurate for p near 1."""
    log_p = log_probability.clamp(max=-torch.finfo(log_probability.dtype).eps)
    return log_p - torch.log(-torch.expm1(log_p))


def _rewards(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    chosen, rejected = chosen.detach(), rejected.detach()
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).to(chosen),
    }


def _log_probs(policy: PairLogProbs) -> dict[str, Tensor]:
    return {"logps/chosen": policy.chosen.detach(), "logps/rejected": policy.rejected.detach()}
