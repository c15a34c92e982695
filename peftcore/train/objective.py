"""The loss that an adapter is trained and evaluated on, inside transformers' Trainer.

Trainer's own wherever its loss is another; next-token cross entropy over labelled tokens alone otherwise, with the
adapters' regulariser once per optimiser step and logged apart from it.
"""

import math
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from peftcore.adapter_set import adapter_set
from peftcore.errors import TrainingError
from peftcore.model import PeftModel
from peftcore.train.losses import has_causal_loss, row_sums, token_losses
from peftcore.train.supervised_head import is_compiled

_Base = Trainer if TYPE_CHECKING else object


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


class ObjectiveMixin(_Base):
    """What AdapterTrainerMixin computes: a step's loss, and an evaluation set's."""

    _regularizers: list[Tensor]
    """Of the steps since the last record, detached."""

    # -- loss --------------------------------------------------------------------------------------------------

    def _computes_label_only_loss(self) -> bool:
        return (
            self.label_smoother is None
            and self.compute_loss_func is None
            and self.model_accepts_loss_kwargs
            and self.args.n_gpu <= 1
            and getattr(self.accelerator, "parallelism_config", None) is None
            and has_causal_loss(adapted_model(self))
            and not any(prompt.defines_loss for prompt in adapter_set(adapted_model(self)).acting_prompts())
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Trainer's, with the label-only loss where the model's own is the same number; compiled models keep theirs."""
        plain = "labels" in inputs and "shift_labels" not in inputs
        if return_outputs or not plain or is_compiled(model) or not self._computes_label_only_loss():
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        else:
            result = self._label_only_loss(model, inputs, num_items_in_batch)
        if not model.training or not self.accelerator.sync_gradients:
            return result
        loss, *rest = cast(tuple[Any, ...], result if return_outputs else (result,))
        loss = self._with_regularizer(loss, num_items_in_batch)
        return (loss, *rest) if return_outputs else loss

    def _label_only_loss(self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None) -> Tensor:
        given = {name: value for name, value in inputs.items() if name != "labels"}
        losses, _ = token_losses(model, given, inputs["labels"])
        if num_items is None:
            return losses.mean()
        loss = losses.sum() / (num_items.to(losses.device) if isinstance(num_items, Tensor) else num_items)
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

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Trainer's; TrainingError as soon as a loss is not finite, before it reaches the weights."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1} (learning rate "
                f"{self._get_learning_rate():.2e}); lower the learning rate, clip gradients, or compute in float32"
            )
        return loss

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
        managed = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if not loss_only or managed or not self._computes_label_only_loss():
            return super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        model = self._wrap_model(cast(nn.Module, self.model), training=False)
        if not self.accelerator._models and model is self.model:  # evaluated without having been trained
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        model.eval()
        self.callback_handler.eval_dataloader = dataloader
        loss, tokens, rows = 0.0, 0, 0
        with torch.random.fork_rng(devices=[]):  # a loader draws a number, which would change training's dropout
            for inputs in dataloader:
                sums, counts = self.accelerator.gather_for_metrics(self._row_losses(model, inputs))
                loss += sums.double().sum().item()
                tokens += int(counts.sum())
                rows += len(counts)
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        if not tokens:
            raise TrainingError("the evaluation set has no supervised token; check its labels")
        if not math.isfinite(loss):
            raise TrainingError(
                f"the evaluation loss is {loss}: the adapter's weights or activations have overflowed; lower the "
                "learning rate, or compute in float32"
            )
        metrics = {f"{metric_key_prefix}_loss": loss / tokens, f"{metric_key_prefix}_tokens": tokens}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=rows)  # type: ignore[arg-type]

    @torch.no_grad()
    def _row_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        inputs = dict(self._prepare_inputs(inputs))
        labels = inputs.pop("labels")
        with self.compute_loss_context_manager():
            return row_sums(*token_losses(model, inputs, labels))
