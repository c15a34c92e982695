"""A Trainer for preference pairs: chosen and rejected answers in one forward, the reference on the same base weights.

Every pair has the same weight (or its own), whatever the gradient accumulation. Logged under TRL's names: rewards,
margins, accuracies and log-probabilities.

Shapes: P pairs.
"""

from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm
from transformers import Trainer

from peftcore.train.batches import REFERENCE_COLUMNS, WEIGHT, LengthGroupedSampler
from peftcore.train.preference import Dpo, PairLogProbs, PreferenceObjective
from peftcore.train.reference import pair_log_probs, stored_log_probs, with_reference_columns
from peftcore.train.reference_objective import Reference, ReferenceObjective
from peftcore.train.trainer import AdapterTrainerMixin

PAIR_COLUMNS = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")
"""Columns of a pair: token ids and labels of both answers, each behind the prompt."""


class PairObjective(ReferenceObjective):
    """Weighted mean of a preference loss over pairs.

    Args:
        trainer: The trainer that minimises this objective.
        pair_loss: `Dpo(...)`, `Orpo(...)`, `SimPo(...)` or another loss of pairs.
        reference: "start" or "base"; see `ReferenceObjective`.
        ref_adapter_name: A frozen adapter that is the reference instead.
    """

    collator_name = "PreferenceCollator"
    examples = "preference pairs"

    def __init__(
        self, trainer: Any, pair_loss: PreferenceObjective, reference: Reference, ref_adapter_name: str | None
    ) -> None:
        super().__init__(trainer, reference, ref_adapter_name)
        self.pair_loss = pair_loss

    @property
    def uses_reference(self) -> bool:
        """True for DPO, IPO and hinge; False for ORPO and SimPO."""
        return self.pair_loss.uses_reference

    def columns(self, signature: list[str]) -> list[str]:
        """Return the columns of the dataset that the loss reads, whatever the model's signature."""
        return [*PAIR_COLUMNS, *REFERENCE_COLUMNS, WEIGHT]

    def lengths(self, dataset: Any) -> list[int]:
        """Return the tokens of both answers, prompts included, of each pair."""
        return [len(row["chosen_input_ids"]) + len(row["rejected_input_ids"]) for row in dataset]

    def example_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return losses and metrics of the pairs, (P,)."""
        policy = pair_log_probs(model, inputs)
        reference = None
        if self.pair_loss.uses_reference:
            reference = stored_log_probs(inputs, policy) or self.reference_log_probs(model, inputs)
        return self.pair_loss.losses(policy, reference)

    def reference_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> PairLogProbs:
        """Return the reference's log-probabilities of a batch, without gradients."""
        with self.reference_in_effect(model) as reference:
            return pair_log_probs(reference, inputs)

    def with_reference(self, rows: Any) -> Any:
        """Return rows with the reference's log-probabilities as columns; each process computes a part of the batches.

        Args:
            rows: A dataset, a dictionary of datasets, or None.
        """
        if rows is None:
            return None
        if isinstance(rows, dict):
            return {name: self.with_reference(each) for name, each in rows.items()}
        trainer = self.trainer
        order = torch.as_tensor(self.lengths(rows)).argsort(descending=True, stable=True)
        model, results = trainer.adapted_model, []
        with trainer.accelerator.split_between_processes(list(order.split(trainer.args.eval_batch_size))) as batches:
            silent = trainer.args.disable_tqdm or not trainer.is_world_process_zero()
            for batch in tqdm(batches, desc="reference", unit="batch", disable=silent):
                inputs = trainer._prepare_inputs(trainer.data_collator([rows[i] for i in batch.tolist()]))
                with trainer.compute_loss_context_manager():
                    log_probs = self.reference_log_probs(model, inputs)
                results.append((batch, log_probs.chosen.cpu(), log_probs.rejected.cpu()))
        indices, chosen, rejected = (torch.cat(parts) for parts in zip(*gather_object(results), strict=True))
        in_row_order = indices.argsort()
        return with_reference_columns(rows, chosen[in_row_order], rejected[in_row_order])


class PreferenceTrainerMixin(AdapterTrainerMixin):
    """Preference training for any Trainer class: `class MyTrainer(PreferenceTrainerMixin, Trainer): ...`.

    The arguments are those of AdapterTrainerMixin and:

    Args:
        objective: `Dpo(...)`, `Orpo(...)`, `SimPo(...)` or another loss of pairs. None: `Dpo()`.
        reference: "start": the model as it is when the trainer is made, of which a frozen copy of the adapters is
            kept. "base": the model without adapters. Both are the same model for adapters that start at zero.
        ref_adapter_name: A frozen adapter that is the reference instead.
        precompute_reference: Compute the reference's log-probabilities once before training, not in each step.

    Raises:
        TrainingError: The model has no next-token logits, the reference is trained, the rows are packed, or
            reference="start" is used with FSDP, which would keep the whole base beside its shards.
    """

    loss_is_scaled_for_ga = True
    training_objective: PairObjective

    def __init__(
        self,
        *args: Any,
        objective: PreferenceObjective | None = None,
        reference: Reference = "start",
        ref_adapter_name: str | None = None,
        precompute_reference: bool = False,
        **kwargs: Any,
    ) -> None:
        self.objective = Dpo() if objective is None else objective
        self._reference_options: tuple[Reference, str | None] = reference, ref_adapter_name
        super().__init__(*args, **kwargs)
        if precompute_reference and self.objective.uses_reference:
            self.train_dataset = self.training_objective.with_reference(self.train_dataset)
            self.eval_dataset = self.training_objective.with_reference(self.eval_dataset)

    def make_objective(self) -> PairObjective:
        """Return the objective that minimises the weighted mean of the pairs' losses."""
        return PairObjective(self, self.objective, *self._reference_options)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        if not self.groups_by_length(eval_dataset):
            return super()._get_eval_sampler(eval_dataset)
        return LengthGroupedSampler(self.training_objective.lengths(eval_dataset), self.args.eval_batch_size)


class PreferenceTrainer(PreferenceTrainerMixin, Trainer):
    """transformers' Trainer for a PeftModel and preference pairs."""
