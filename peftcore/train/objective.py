"""The loss that an adapter is trained and evaluated on, inside transformers' Trainer.

Trainer's own wherever its loss is another; next-token cross entropy over labelled tokens alone otherwise, with rows'
weights where they have some, and with the adapters' regulariser once per optimiser step and logged apart from it.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from peftcore.errors import TrainingError
from peftcore.injection.adapter_set import adapter_set
from peftcore.model import PeftModel
from peftcore.train.losses import OwnLossCheck, has_causal_loss, row_sums, token_losses
from peftcore.train.supervised_head import is_compiled
from peftcore.train.weights import WEIGHT, RowWeightsMixin, token_weights


def adapted_model(trainer: Trainer) -> Any:
    """The trainer's model, a PeftModel and nn.Module at once, without what data parallelism wraps around it.

    Raises TrainingError where it has no adapter.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not isinstance(model, PeftModel):
        raise TrainingError(
            f"the model to train is a {type(model).__name__} without adapters; call get_peft_model on it first"
        )
    return model


class ObjectiveMixin(RowWeightsMixin):
    """What AdapterTrainerMixin computes: a step's loss, and an evaluation set's."""

    _regularizers: list[Tensor]
    """Of the steps since the last record, detached."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._own_loss = OwnLossCheck()
        super().__init__(*args, **kwargs)

    # -- loss --------------------------------------------------------------------------------------------------

    def _computes_label_only_loss(self) -> bool:
        return (
            not self._own_loss.differs
            and self._trainer_computes_next_token_loss()
            and self.label_smoother is None
            and self.compute_loss_func is None
            and self.model_accepts_loss_kwargs
            and self.args.n_gpu <= 1
            and getattr(self.accelerator, "parallelism_config", None) is None
            and has_causal_loss(adapted_model(self))
            and not any(prompt.defines_loss for prompt in adapter_set(adapted_model(self)).prompts_in_effect())
        )

    def _trainer_computes_next_token_loss(self) -> bool:
        """Whether the trainer below this mixin has no objective of its own, such as DPO or a user's `compute_loss`."""
        classes = type(self).__mro__
        below = classes[classes.index(ObjectiveMixin) + 1 :]
        owner = next(each for each in below if "compute_loss" in vars(each))
        if owner.__name__ == "SFTTrainer":  # TRL's, whose default computes the same number in its own way
            return getattr(self.args, "loss_type", "nll") == "nll"
        return owner is Trainer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Trainer's, with the label-only loss where the model's own is the same number; compiled models keep theirs."""
        plain = "labels" in inputs and "shift_labels" not in inputs and not return_outputs
        label_only = plain and self._computes_label_only_loss() and self._own_loss_agrees(model, inputs)
        if WEIGHT in inputs and not label_only:
            raise TrainingError(
                f"rows have weights, which the loss of this {type(adapted_model(self)).__name__} cannot take in: they "
                "are for next-token cross entropy without further terms, label smoothing or a loss function of one's "
                f"own, evaluated with prediction_loss_only=True; remove the column {WEIGHT!r}, or those"
            )
        if not label_only or (is_compiled(model) and WEIGHT not in inputs):
            result = super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        else:
            result = self._label_only_loss(model, inputs, num_items_in_batch)
        if not model.training or not self.accelerator.sync_gradients:
            return result
        loss, *rest = cast(tuple[Any, ...], result if return_outputs else (result,))
        loss = self._with_regularizer(loss, num_items_in_batch)
        return (loss, *rest) if return_outputs else loss

    def _own_loss_agrees(self, model: nn.Module, inputs: dict[str, Any]) -> bool:
        if is_compiled(model):
            return True  # it keeps its own loss; rows with weights have no other
        others = {name: value for name, value in inputs.items() if name not in ("labels", WEIGHT)}
        return self._own_loss.agrees(model, others, inputs["labels"])

    def _label_only_loss(self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None) -> Tensor:
        given = {name: value for name, value in inputs.items() if name not in ("labels", WEIGHT)}
        losses, mask = token_losses(model, given, inputs["labels"])
        if WEIGHT in inputs:
            weights = token_weights(inputs[WEIGHT], mask).to(losses)
            total = (losses * weights).sum()
            return total / weights.sum() if num_items is None else self._share(total, num_items)
        return losses.mean() if num_items is None else self._share(losses.sum(), num_items)

    def _share(self, total: Tensor, num_items: Tensor | int) -> Tensor:
        """What a summed loss adds to the mean over the `num_items` of the whole accumulated batch."""
        loss = total / (num_items.to(total.device) if isinstance(num_items, Tensor) else num_items)
        if self.args.average_tokens_across_devices:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())  # processes average gradients
        return loss

    def _with_regularizer(self, loss: Tensor, num_items: Tensor | int | None) -> Tensor:
        """Add the regulariser's gradient; the value stays the task's loss, so that the two are logged apart."""
        regularizer = adapted_model(self).adapter_regularizer()
        if regularizer is None:
            return loss
        self._regularizers.append(regularizer.detach())
        if not self._scaled_over_accumulation(num_items):  # Trainer divides the sum once more
            regularizer = regularizer * self.current_gradient_accumulation_steps
        return loss + (regularizer - regularizer.detach()).to(loss)

    def _scaled_over_accumulation(self, num_items: Tensor | int | None) -> bool:
        if self.loss_is_scaled_for_ga is not None:
            return self.loss_is_scaled_for_ga
        return (self.model_accepts_loss_kwargs and num_items is not None) or self.compute_loss_func is not None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's, with the mean `regularizer` of the steps since the last record."""
        if "loss" in logs and self._regularizers:
            logs["regularizer"] = torch.stack(self._regularizers).mean().item()
            self._regularizers.clear()
        super().log(logs, start_time)

    # -- evaluation --------------------------------------------------------------------------------------------

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Trainer's; where only the loss is asked for, it is the mean over the set's tokens, not over its batches."""
        loss_only = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        managed = self.is_deepspeed_enabled or (self.is_fsdp_enabled and not self.accelerator.is_fsdp2)
        if not loss_only or managed or not self._computes_label_only_loss():
            return super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        model = self._wrap_model(cast(nn.Module, self.model), training=False)
        if not self.accelerator._models and model is self.model:  # evaluated without having been trained
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        model.eval()
        self.callback_handler.eval_dataloader = dataloader
        batches: list[dict[str, Tensor]] = []
        with torch.random.fork_rng(devices=[]):  # a loader draws a number, which would change training's dropout
            for inputs in dataloader:
                if not self._evaluates_rows(model, inputs):
                    return super().evaluation_loop(
                        dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
                    )
                found = self.accelerator.gather_for_metrics(self._row_figures(model, inputs))
                figures = cast(dict[str, Tensor], found)
                batches.append({name: figure.cpu() for name, figure in figures.items()})
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        of_set = self._evaluation_metrics(batches)
        if not math.isfinite(of_set["loss"]):
            raise TrainingError(
                f"the evaluation loss is {of_set['loss']}: the adapter's weights or activations have overflowed; lower "
                "the learning rate, or compute in float32"
            )
        metrics = {f"{metric_key_prefix}_{name}": figure for name, figure in of_set.items()}
        rows = sum(len(batch["loss"]) for batch in batches)
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=rows)  # type: ignore[arg-type]

    def _evaluates_rows(self, model: nn.Module, inputs: dict[str, Any]) -> bool:
        """Return whether the model's own loss of this batch is a mean of its rows' figures."""
        with self.compute_loss_context_manager():
            return self._own_loss_agrees(model, dict(self._prepare_inputs(inputs)))

    @torch.no_grad()
    def _row_figures(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Of each row (B,): its summed loss, its supervised tokens and, where rows have weights, what those weigh."""
        inputs = dict(self._prepare_inputs(inputs))
        labels, weight = inputs.pop("labels"), inputs.pop(WEIGHT, None)
        with self.compute_loss_context_manager():
            losses, mask = token_losses(model, inputs, labels)
        if weight is None:
            sums, counts = row_sums(losses, mask)
            return {"loss": sums, "tokens": counts}
        weights = token_weights(weight, mask).to(losses)
        sums, counts = row_sums(losses * weights, mask)
        return {"loss": sums, "tokens": counts, WEIGHT: row_sums(weights, mask)[0]}

    def _evaluation_metrics(self, batches: list[dict[str, Tensor]]) -> dict[str, float]:
        """Metrics of a whole set, from the figures of its rows, batch by batch; `loss` is among them."""
        loss = sum(batch["loss"].double().sum().item() for batch in batches)
        tokens = sum(int(batch["tokens"].sum()) for batch in batches)
        if not tokens:
            raise TrainingError("the evaluation set has no supervised token; check its labels")
        weighted = any(WEIGHT in batch for batch in batches)
        weight = sum(batch[WEIGHT].double().sum().item() for batch in batches) if weighted else tokens
        return {"loss": loss / weight if weight else math.nan, "tokens": tokens}
