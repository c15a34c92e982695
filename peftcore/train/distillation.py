"""A Trainer with a teacher: distillation, or a penalty on drifting from an earlier version.

    loss = Σ_t w_t (λ_nll ℓ_t + λ D_t) / Σ_t w_t

over the supervised tokens t of the accumulated batch. ℓ: cross entropy. D: divergence from the teacher's distribution
(`peftcore.train.divergence`). w: weights of rows.

With `OnPolicy`, the student samples the answers of a share of the batches, whose tokens have no cross entropy.

The teacher is the base without adapters, a frozen adapter of the same model, or another model with the same tokens. A
larger model is a teacher to learn from (λ_nll = 0 or small); the adapter in use is one to stay near (λ small).

Shapes: B rows, T positions, n supervised tokens, V vocabulary.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer

from peftcore.errors import ConfigError, TrainingError
from peftcore.injection.adapter_set import adapter_set
from peftcore.train.batches import WEIGHT
from peftcore.train.divergence import Divergence, token_divergences
from peftcore.train.losses import row_sums, supervised_positions, token_weights
from peftcore.train.objective import TokenObjective
from peftcore.train.on_policy import SAMPLED, OnPolicy
from peftcore.train.packing import PackedCollator
from peftcore.train.reference import reference_acting
from peftcore.train.supervised_head import supervised_logits
from peftcore.train.trainer import AdapterTrainerMixin

_PARTS = ("nll", "divergence")


@dataclass(frozen=True)
class Distillation:
    """Weights of the cross entropy and of the divergence from the teacher.

    Raises:
        ConfigError: A value is out of range.
    """

    divergence: Divergence = "forward_kl"
    weight: float = 1.0
    """Factor of the divergence, λ, above 0."""
    nll_weight: float = 1.0
    """Factor of the cross entropy, λ_nll, at least 0."""
    temperature: float = 1.0
    """Divisor of both models' logits in the divergence, above 0."""
    beta: float = 0.5
    """jsd: weight of the teacher in the mixture, between 0 and 1."""

    def __post_init__(self) -> None:
        if self.divergence not in get_args(Divergence):
            raise ConfigError(f"divergence must be one of {', '.join(get_args(Divergence))}; got {self.divergence!r}")
        for name in ("weight", "temperature"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0; got {getattr(self, name)}")
        if not self.nll_weight >= 0:
            raise ConfigError(f"nll_weight must be at least 0; got {self.nll_weight}")
        if not 0 < self.beta < 1:
            raise ConfigError(f"beta must be between 0 and 1; got {self.beta}")

    def divergences(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the divergence of each token, (n,) in nats, from logits (n, V)."""
        return token_divergences(student, teacher, self.divergence, self.temperature, self.beta)


class DistillationObjective(TokenObjective):
    """Cross entropy and divergence from a teacher, over supervised tokens.

    Args:
        trainer: The trainer that minimises this objective.
        distillation: The weights.
        teacher: A causal language model, the name of a frozen adapter, or None: the base without adapters.
        on_policy: Sampling of answers by the student. None: the answers of the rows.
    """

    returns_outputs = False

    def __init__(
        self,
        trainer: Any,
        distillation: Distillation,
        teacher: nn.Module | str | None,
        on_policy: OnPolicy | None = None,
    ) -> None:
        super().__init__(trainer)
        self.on_policy = on_policy
        self.distillation = distillation
        self.teacher = teacher
        self._sums: list[Tensor] = []  # nll, divergence and tokens of the forward passes since the last record

    def check(self) -> None:
        """Raise TrainingError for another loss or a trained teacher; freeze the teacher."""
        super().check()
        trainer = self.trainer
        if not self.is_sum_over_items():
            raise TrainingError(
                f"{type(trainer).__name__} needs a causal language model and plain next-token cross entropy: remove "
                "label_smoothing_factor, compute_loss_func and losses of the model's own"
            )
        if self.on_policy is not None and isinstance(trainer.data_collator, PackedCollator):
            raise TrainingError(
                "on-policy distillation samples an answer to each row's prompt, and packed rows have no bounds; give "
                "data_collator=RightPaddingCollator(pad_token_id)"
            )
        if self.on_policy is not None and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            raise TrainingError(
                "sampling answers needs the whole model in each process, and FSDP or DeepSpeed shards it; train "
                "without them, or without on_policy"
            )
        if isinstance(self.teacher, str):
            adapters = adapter_set(trainer.adapted_model)
            adapters.require(self.teacher)
            if any(parameter.requires_grad for parameter in adapters.parameters(self.teacher)):
                raise TrainingError(
                    f"the teacher adapter {self.teacher!r} is trained; load it with is_trainable=False, or freeze it "
                    "with set_requires_grad"
                )
        elif self.teacher is not None:
            if self.teacher is trainer.adapted_model:
                raise TrainingError(
                    "the teacher is the model that is trained; give another model, or an adapter's name"
                )
            self.teacher.requires_grad_(False).eval()
            if not getattr(self.teacher, "hf_device_map", None):
                self.teacher.to(trainer.args.device)

    def reset(self) -> None:
        """Forget the metrics of an earlier run."""
        self._sums.clear()

    def state(self) -> dict[str, Any]:
        """Return the sums since the last training record, of each process."""
        return {"sums": self.trainer.processes.of_each(self._sums)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore the sums since the last training record."""
        if "sums" in state:  # a checkpoint of an earlier version lacks them
            for sums in self.trainer.processes.share_of(state["sums"]):
                self._sums.extend(sums)

    @contextmanager
    def _teacher_in_effect(self, model: nn.Module) -> Iterator[nn.Module]:
        if isinstance(self.teacher, nn.Module):
            with torch.no_grad():
                yield self.teacher
        else:
            with reference_acting(self.trainer.adapted_model, self.teacher):
                yield model

    def token_parts(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Return cross entropies (n,) and divergences (n,) in nats, and the mask (B, T) of supervised positions."""
        labels = inputs["labels"]
        arguments = {name: value for name, value in inputs.items() if name not in ("labels", WEIGHT, SAMPLED)}
        mask = supervised_positions(labels)
        with self._teacher_in_effect(model) as teacher:
            teacher_logits = supervised_logits(teacher, arguments, mask)
        logits = supervised_logits(model, arguments, mask)
        targets = labels[:, 1:][mask[:, :-1]].to(logits.device)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nll = F.cross_entropy(wide, targets, reduction="none")
        if SAMPLED in inputs:
            nll = nll * (1 - token_weights(inputs[SAMPLED], mask).to(nll))
        return nll, self.distillation.divergences(logits, teacher_logits), mask

    def loss(
        self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None, return_outputs: bool
    ) -> Tensor:
        """Return the batch's share of the mean over the optimiser step, or the batch's own mean. Outputs are empty."""
        nll, divergences, mask = self.token_parts(model, inputs)
        losses = self.distillation.nll_weight * nll + self.distillation.weight * divergences
        weights = torch.ones_like(losses)
        if WEIGHT in inputs:
            weights = token_weights(inputs[WEIGHT], mask).to(losses)
        if model.training:
            self._sums.append(torch.stack([(part * weights).sum().detach() for part in (nll, divergences)]))
            self._sums[-1] = torch.cat([self._sums[-1], weights.sum()[None]])
        total = (losses * weights).sum()
        return total / weights.sum() if num_items is None else self.share_of_mean(total, num_items)

    def unrecorded(self) -> list[Any]:
        """Return the sums of the forward passes since the last training record."""
        return self._sums

    def record(self) -> dict[str, float]:
        """Return the mean `nll` and `divergence` (nats per token) since the last training record. A collective call."""
        if not self._sums:
            return {}
        sums = torch.stack([each.float() for each in self._sums]).sum(0)
        self._sums.clear()
        *parts, weight = cast(Tensor, self.trainer.accelerator.reduce(sums, "sum")).tolist()
        return {name: part / weight for name, part in zip(_PARTS, parts, strict=True)} if weight else {}

    def evaluates_rows(self, model: nn.Module, inputs: dict[str, Any]) -> bool:
        """Return True: the loss is defined here, whatever the model's own."""
        return True

    def row_metrics(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Return summed `loss`, `nll` and `divergence` (nats), and the metrics of TokenObjective, each (B,)."""
        nll, divergences, mask = self.token_parts(model, inputs)
        weights = token_weights(inputs[WEIGHT], mask).to(nll) if WEIGHT in inputs else torch.ones_like(nll)
        sums = {name: row_sums(part * weights, mask)[0] for name, part in zip(_PARTS, (nll, divergences), strict=True)}
        loss = self.distillation.nll_weight * sums["nll"] + self.distillation.weight * sums["divergence"]
        metrics = {"loss": loss, "tokens": mask.sum(1).to(loss.device), **sums}
        return metrics | ({WEIGHT: row_sums(weights, mask)[0]} if WEIGHT in inputs else {})

    def set_metrics(self, batches: list[dict[str, Tensor]]) -> dict[str, float]:
        """Return the mean `loss`, `nll` and `divergence` per token in nats, and the number of supervised `tokens`."""
        parts = {}
        for name in _PARTS:
            renamed = [{**batch, "loss": batch[name]} for batch in batches]
            parts[name] = super().set_metrics(renamed)["loss"]
        return super().set_metrics(batches) | parts


class DistillationTrainerMixin(AdapterTrainerMixin):
    """Training with a teacher for any Trainer class: `class MyTrainer(DistillationTrainerMixin, Trainer): ...`.

    The arguments are those of AdapterTrainerMixin and:

    Args:
        distillation: Divergence and weights. None: `Distillation()`.
        teacher: A causal language model with the same tokens, which is frozen and moved to the trainer's device. Or the
            name of a frozen adapter of the model. None: the base without adapters.
        on_policy: Sampling of answers by the student, for a share of the batches. None: the answers of the rows.

    Raises:
        TrainingError: The model has no next-token loss, the trainer has another loss, or the teacher is trained.
    """

    training_objective: DistillationObjective

    def __init__(
        self,
        *args: Any,
        distillation: Distillation | None = None,
        teacher: nn.Module | str | None = None,
        on_policy: OnPolicy | None = None,
        **kwargs: Any,
    ) -> None:
        self._distillation = Distillation() if distillation is None else distillation, teacher, on_policy
        super().__init__(*args, **kwargs)

    def make_objective(self) -> DistillationObjective:
        """Return cross entropy with the divergence from the teacher."""
        return DistillationObjective(self, *self._distillation)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Return the batches of an optimiser step, a share of them with sampled answers, and their items."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.training_objective.on_policy is None or not batches:
            return batches, items
        batches = self.training_objective.on_policy.sampled(self, batches)
        return batches, self._get_num_items_in_batch(batches, device)


class DistillationTrainer(DistillationTrainerMixin, Trainer):
    """transformers' Trainer for a PeftModel with a teacher."""
