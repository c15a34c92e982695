"""A Trainer for single answers that are marked as desirable or undesirable; the reference shares the base weights.

The reference point z of a training batch is TRL's: each prompt gets the answer of the row before it in the batch, and z
is the mean log-ratio of these mismatched answers, over all processes. Here both models are in evaluation mode for it.
In evaluation, z is the mean over the whole evaluation set, and the row before is that of the set, so the metrics do not
depend on the batches.

Shapes: E examples of one forward pass.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer

from peftcore.errors import TrainingError
from peftcore.train.batches import MISMATCHED, WEIGHT, with_mismatched_answers
from peftcore.train.kto import Kto, kto_reference_point
from peftcore.train.out_of_memory import split_rows
from peftcore.train.reference import inference_mode, row_log_probs
from peftcore.train.reference_objective import Reference, ReferenceObjective
from peftcore.train.trainer import AdapterTrainerMixin

UNPAIRED_COLUMNS = ("input_ids", "labels", "desirable")
"""Columns of an answer: token ids and labels of the prompt with the answer, and whether the answer is desirable."""
_POINT = "reference_point"
_INPUTS = ("input_ids", "attention_mask", "labels")


class KtoObjective(ReferenceObjective):
    """Weighted mean of the KTO loss over answers.

    Args:
        trainer: The trainer that minimises this objective.
        kto: The loss.
        reference: "start" or "base"; see `ReferenceObjective`.
        ref_adapter_name: A frozen adapter that is the reference instead.
    """

    collator_name = "UnpairedPreferenceCollator"
    examples = "unpaired preferences"

    def __init__(self, trainer: Any, kto: Kto, reference: Reference, ref_adapter_name: str | None) -> None:
        super().__init__(trainer, reference, ref_adapter_name)
        self.kto = kto

    def columns(self, signature: list[str]) -> list[str]:
        """Return the columns of the dataset that the loss reads, whatever the model's signature."""
        return [*UNPAIRED_COLUMNS, *(f"{MISMATCHED}{name}" for name in ("input_ids", "labels")), WEIGHT]

    # -- log-ratios --------------------------------------------------------------------------------------------

    def with_reference_point(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return a training batch with the reference point, a scalar, in place of its mismatched answers.

        The point belongs to the whole batch, so parts of a batch that does not fit into memory have the same losses.
        """
        trainer = self.trainer
        inputs = dict(trainer._prepare_inputs(inputs))
        with trainer.compute_loss_context_manager():
            ratios = self.mismatched_log_ratios(model, inputs)
        inputs = {name: value for name, value in inputs.items() if not name.startswith(MISMATCHED)}
        # A process without mismatched answers adds nothing. One dtype, because `ratios` is float32 there.
        sums = torch.stack([ratios.sum(), torch.tensor(len(ratios)).to(ratios)]).float()
        total, count = cast(Tensor, trainer.accelerator.reduce(sums, "sum")).unbind()
        return inputs | {_POINT: kto_reference_point(total[None] / count.clamp(min=1))}

    def mismatched_log_ratios(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Return the log-ratios of the mismatched answers, (E,) without gradients; (0,) if the loss needs none."""
        rows = [inputs.get(f"{MISMATCHED}{name}") for name in _INPUTS]
        if not self.kto.uses_reference_point or rows[0] is None:
            return torch.zeros(0, device=inputs["input_ids"].device)
        batch: dict[str, Any] = dict(zip(_INPUTS, rows, strict=True))
        parts = split_rows(batch, self.trainer.splitter.rows_at_once or len(rows[0]))
        ratios = []
        for part in parts:
            with inference_mode(self.trainer.adapted_model):
                policy, _ = row_log_probs(model, **part)
            ratios.append(policy - self.reference_log_probs(model, part))
        return torch.cat(ratios)

    def reference_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Return the reference's log-probabilities of answers, (E,) without gradients."""
        with self.reference_in_effect(model) as reference:
            return row_log_probs(reference, *(inputs[name] for name in _INPUTS))[0]

    def example_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return losses (E,), and the metrics that `group_means` takes."""
        if "desirable" not in inputs:
            raise TrainingError(
                "the batch does not say which answers are 'desirable'; give "
                f"data_collator={self.collator_name}(pad_token_id)"
            )
        reference = self.reference_log_probs(model, inputs)
        policy, _ = row_log_probs(model, *(inputs[name] for name in _INPUTS))
        point = inputs.get(_POINT)
        if point is None:
            point = kto_reference_point(self.mismatched_log_ratios(model, inputs)).to(policy)
        losses = self.kto.losses(policy - reference, inputs["desirable"], point)
        return losses, self._metrics((policy - reference).detach(), policy.detach(), inputs["desirable"], point)

    def _metrics(self, ratios: Tensor, policy: Tensor, desirable: Tensor, point: Tensor) -> dict[str, Tensor]:
        """Return metrics (E,) whose means `group_means` turns into means over either kind of answers."""
        rewards, chosen = self.kto.beta * ratios, desirable.to(ratios)
        return {
            "desirable": chosen,
            "rewards/chosen": rewards * chosen,
            "rewards/rejected": rewards * (1 - chosen),
            "logps/chosen": policy * chosen,
            "logps/rejected": policy * (1 - chosen),
            "rewards/accuracies": (self.kto.gains(ratios, desirable, point) > 0).to(ratios),
            "kl": point.to(ratios).expand_as(ratios),
        }

    # -- metrics -----------------------------------------------------------------------------------------------

    def record(self) -> dict[str, float]:
        """Return the metrics since the last training record, under TRL's names."""
        return group_means(super().record())

    def row_metrics(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Return `weight`, `desirable`, log-probabilities and log-ratios of each answer, (E,).

        `loss` is weighted, and at the reference point of this batch; `set_metrics` computes the losses of the set.
        """
        reference = self.reference_log_probs(model, inputs)
        policy, _ = row_log_probs(model, *(inputs[name] for name in _INPUTS))
        mismatched = self.mismatched_log_ratios(model, inputs).to(policy)
        weights, desirable = self.example_weights(inputs).to(policy), inputs["desirable"]
        losses = self.kto.losses(policy - reference, desirable, kto_reference_point(mismatched))
        absent = torch.full_like(policy, torch.nan)
        return {
            "loss": losses * weights,
            WEIGHT: weights,
            "desirable": desirable,
            "policy": policy,
            "ratio": policy - reference,
            "mismatched": mismatched if len(mismatched) else absent,
        }

    def set_metrics(self, batches: list[dict[str, Tensor]]) -> dict[str, float]:
        """Return the weighted mean `loss` at the set's reference point, and the metrics under TRL's names."""
        rows = {name: torch.cat([batch[name] for batch in batches]) for name in (batches or [{}])[0]}
        if not rows or not rows[WEIGHT].sum():
            raise TrainingError("the evaluation set is empty, or all its weights are 0; add rows with a weight above 0")
        desirable, weights = rows["desirable"].bool(), rows[WEIGHT].double()
        ratios, policy, mismatched = (rows[name].double() for name in ("ratio", "policy", "mismatched"))
        point = kto_reference_point(mismatched[~mismatched.isnan()])
        loss = (self.kto.losses(ratios, desirable, point) * weights).sum() / weights.sum()
        metrics = self._metrics(ratios, policy, desirable, point)
        means = {name: values[weights > 0].mean().item() for name, values in metrics.items()}
        return {"loss": loss.item(), **group_means(means)}


def group_means(means: dict[str, float]) -> dict[str, float]:
    """Return means over desirable (`chosen`) and over undesirable (`rejected`) answers from means over all answers.

    Args:
        means: Means of `KtoObjective`'s metrics; those of one kind of answers are 0 at the other kind.

    Returns:
        The metrics under TRL's names, without those of a kind that has no answers.
    """
    if not means:
        return {}
    shares = {"chosen": means["desirable"], "rejected": 1 - means["desirable"]}
    metrics = {name: means[name] for name in ("kl", "rewards/accuracies")}
    for kind, share in shares.items():
        if share > 0:
            metrics |= {name: means[name] / share for name in (f"rewards/{kind}", f"logps/{kind}")}
    if all(share > 0 for share in shares.values()):
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return metrics


class KtoTrainerMixin(AdapterTrainerMixin):
    """KTO for any Trainer class: `class MyTrainer(KtoTrainerMixin, Trainer): ...`.

    The collator is an UnpairedPreferenceCollator. The arguments are those of AdapterTrainerMixin and:

    Args:
        objective: The loss. None: `Kto()`.
        reference: "start": the model as it is when the trainer is made, of which a frozen copy of the adapters is
            kept. "base": the model without adapters. Both are the same model for adapters that start at zero.
        ref_adapter_name: A frozen adapter that is the reference instead.

    Raises:
        TrainingError: The model has no next-token logits, the reference is trained, the rows are packed, a batch has a
            single row (whose prompt has no other answer), or reference="start" is used with FSDP.
    """

    loss_is_scaled_for_ga = True
    training_objective: KtoObjective

    def __init__(
        self,
        *args: Any,
        objective: Kto | None = None,
        reference: Reference = "start",
        ref_adapter_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        self._kto_options = Kto() if objective is None else objective, reference, ref_adapter_name
        super().__init__(*args, **kwargs)
        if self._kto_options[0].uses_reference_point:
            if self.args.train_batch_size < 2:
                raise TrainingError(
                    "KTO's reference point needs the answers of other rows of the batch; give "
                    "per_device_train_batch_size=2 or more, or Kto(loss='apo_zero_unpaired')"
                )
            limit = getattr(self.data_collator, "max_length", None)
            self.eval_dataset = with_mismatched_answers(self.eval_dataset, limit)

    def make_objective(self) -> KtoObjective:
        """Return the objective that minimises the weighted mean of the answers' losses."""
        return KtoObjective(self, *self._kto_options)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Compute the batch's reference point, then the gradients as AdapterTrainerMixin does."""
        inputs = self.training_objective.with_reference_point(model, inputs)
        return super().training_step(model, inputs, num_items_in_batch)


class KtoTrainer(KtoTrainerMixin, Trainer):
    """transformers' Trainer for a PeftModel and answers that are marked as desirable or undesirable."""
