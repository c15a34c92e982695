"""A Trainer for pairs of answers: chosen and rejected in one forward, the reference in the same model.

Every pair counts alike (or by its weight) whatever the accumulation. Logged: the objective's rewards, margins,
accuracies and log-probabilities, under TRL's names.
"""

from typing import Any, Literal, get_args

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm
from transformers import Trainer

from peftcore.errors import TrainingError
from peftcore.injection.adapter_set import adapter_set
from peftcore.train.batches import REFERENCE_COLUMNS, LengthGroupedSampler
from peftcore.train.example_objective import ExampleObjectiveMixin
from peftcore.train.losses import has_causal_loss
from peftcore.train.objective import adapted_model
from peftcore.train.preference import Dpo, PairLogProbs, PreferenceObjective
from peftcore.train.reference import (
    pair_log_probs,
    reference_acting,
    reference_model,
    stored_log_probs,
    with_reference_columns,
)
from peftcore.train.trainer import AdapterTrainerMixin
from peftcore.train.weights import WEIGHT

Reference = Literal["start", "base"]
PAIR_COLUMNS = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")
"""What a row of pairs has: token ids and labels of either answer behind its prompt."""


class PreferenceTrainerMixin(ExampleObjectiveMixin):
    """For any Trainer class: `class MyTrainer(PreferenceTrainerMixin, AdapterTrainerMixin, Trainer)`.

    objective: `Dpo(...)`, `Orpo(...)` or one of your own.
    reference: "start", the model as it is when the trainer is made, of which a frozen copy of the adapters is kept; or
    "base", the model without adapters. They are the same model for adapters that start at zero.
    ref_adapter_name: a frozen adapter that is the reference in the place of both.
    precompute_reference: take the reference's log-probabilities once, before training, rather than in each step.
    Raises TrainingError for a model without next-token logits, a reference that trains, packed rows, or "start" with
    FSDP, which would keep the base whole beside its shards.
    """

    _fitting_collator = "PreferenceCollator"

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
        if reference not in get_args(Reference):
            raise TrainingError(f"reference is one of {', '.join(get_args(Reference))}; got {reference!r}")
        self.ref_adapter_name = ref_adapter_name
        self._start: Any = None
        super().__init__(*args, **kwargs)
        model = adapted_model(self)
        if not has_causal_loss(model):
            raise TrainingError(f"pairs of answers are for causal language models, and {type(model).__name__} is none")
        if ref_adapter_name is not None:
            adapters = adapter_set(model)
            adapters.require(ref_adapter_name)
            if any(p.requires_grad for p in adapters.parameters(ref_adapter_name)):
                raise TrainingError(
                    f"the reference {ref_adapter_name!r} trains itself; load it with is_trainable=False, or freeze it "
                    "with set_requires_grad"
                )
        if reference == "start" and ref_adapter_name is None and self.objective.uses_reference:
            self._start = self._reference_of_start(model)
        if precompute_reference and self.objective.uses_reference:
            self.train_dataset = self._with_reference(self.train_dataset)
            self.eval_dataset = self._with_reference(self.eval_dataset)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*PAIR_COLUMNS, *REFERENCE_COLUMNS, WEIGHT]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthGroupedSampler(_lengths(dataset), self.args.train_batch_size, seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        if self.args.train_sampling_strategy != "group_by_length" or not hasattr(eval_dataset, "__len__"):
            return super()._get_eval_sampler(eval_dataset)
        return LengthGroupedSampler(_lengths(eval_dataset), self.args.eval_batch_size)

    # -- loss --------------------------------------------------------------------------------------------------

    def _example_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        policy = pair_log_probs(model, inputs)
        reference = None
        if self.objective.uses_reference:
            reference = stored_log_probs(inputs, policy) or self._reference(model, inputs)
        return self.objective.losses(policy, reference)

    def _reference_of_start(self, model: Any) -> Any:
        if self.is_fsdp_enabled:
            raise TrainingError(
                "reference='start' keeps a copy of the model that shares the base's weights, and FSDP shards those; "
                "give reference='base' if the adapter is new, or ref_adapter_name, a frozen adapter"
            )
        return reference_model(model)

    def _reference(self, model: nn.Module, inputs: dict[str, Any]) -> PairLogProbs:
        if self._start is not None:
            with torch.no_grad():
                return pair_log_probs(self._start, inputs)
        with reference_acting(adapted_model(self), self.ref_adapter_name):
            return pair_log_probs(model, inputs)

    def _with_reference(self, rows: Any) -> Any:
        """Rows with the reference's log-probabilities as columns; each process computes its share of the batches."""
        if rows is None:
            return None
        if isinstance(rows, dict):
            return {name: self._with_reference(each) for name, each in rows.items()}
        collate: Any = self.data_collator
        order = torch.as_tensor(_lengths(rows)).argsort(descending=True, stable=True)
        model, found = adapted_model(self), []
        with self.accelerator.split_between_processes(list(order.split(self.args.eval_batch_size))) as batches:
            hidden = self.args.disable_tqdm or not self.is_world_process_zero()
            for batch in tqdm(batches, desc="reference", unit="batch", disable=hidden):
                inputs = self._prepare_inputs(collate([rows[i] for i in batch.tolist()]))
                with self.compute_loss_context_manager():
                    log_probs = self._reference(model, inputs)
                found.append((batch, log_probs.chosen.cpu(), log_probs.rejected.cpu()))
        indices, chosen, rejected = (torch.cat(parts) for parts in zip(*gather_object(found), strict=True))
        back = indices.argsort()
        return with_reference_columns(rows, chosen[back], rejected[back])


class PreferenceTrainer(PreferenceTrainerMixin, AdapterTrainerMixin, Trainer):
    """transformers' Trainer for a PeftModel and pairs of answers."""


def _lengths(rows: Any) -> list[int]:
    """Tokens of both answers, prompts included, of each pair."""
    return [len(row["chosen_input_ids"]) + len(row["rejected_input_ids"]) for row in rows]
