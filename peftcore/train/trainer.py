"""transformers' Trainer for adapters: label-only loss, regulariser, rank allocation, and resuming that is exact.

Everything about loops, schedules, precision and processes is transformers'. The mixin adds what an adapter needs and
what plain Trainer gets wrong for one:

- the loss of `peftcore.train.losses`, over the supervised tokens of the whole accumulated batch; in evaluation,
  over those of the whole set, keeping no logits;
- the adapters' regulariser, once per optimiser step, logged apart from the loss;
- the adapters' work between steps (AdaLoRA's allocator), after the optimiser and before gradients are cleared;
- checkpoints that are whole or do not count, and from which adapters, averages and masks come back exactly.
"""

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints

from peftcore.adapter_set import adapter_set
from peftcore.bases.quantized import keep_quantized_weights_trainable
from peftcore.errors import TrainingError
from peftcore.model import PeftModel
from peftcore.train.batches import LengthGroupedSampler
from peftcore.train.checkpoints import TRAINER_STATE, last_good_checkpoint, seal_checkpoint
from peftcore.train.losses import has_causal_loss, row_sums, token_losses

ADAPTER_STATE = "adapter_state.safetensors"
"""File of a checkpoint that holds what resuming needs beyond the adapters' saved weights."""

_Base = Trainer if TYPE_CHECKING else object


class _StepCallback(TrainerCallback):
    """Tells the adapters that the optimiser has stepped."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # With a gradient scaler a step is skipped when gradients overflow; they say nothing about importance then.
        if not self.trainer.accelerator.optimizer_step_was_skipped:
            adapted_model(self.trainer).on_optimizer_step(state.global_step + 1, self.trainer.optimizer)


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


class AdapterTrainerMixin(_Base):
    """For any Trainer class: `class MyTrainer(AdapterTrainerMixin, Trainer)`. The model is a PeftModel."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model = adapted_model(self)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise TrainingError(
                "nothing to train: every parameter is frozen; load the adapter with is_trainable=True, or activate "
                "it with set_adapter"
            )
        keep_quantized_weights_trainable(model)
        if getattr(self.args, "activation_checkpointing", False):
            # A frozen embedding gives outputs without gradient, which a checkpointed block would take for constant.
            model.enable_input_require_grads()
        self._regularizers: list[Tensor] = []
        self.add_callback(_StepCallback(self))

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
        """Trainer's, with the label-only loss where the model's own loss is the same number."""
        plain = "labels" in inputs and "shift_labels" not in inputs
        if return_outputs or not plain or not self._computes_label_only_loss():
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

    # -- batches -----------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """`train_sampling_strategy="group_by_length"` gives batches of like length in random order."""
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(train_dataset)
        columns = getattr(dataset, "column_names", None) or ()
        column = self.args.length_column_name
        lengths = list(dataset[column]) if column in columns else [len(row["input_ids"]) for row in dataset]
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthGroupedSampler(lengths, self.args.train_batch_size, seed)

    # -- checkpoints -------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; `resume_from_checkpoint=True` is the last whole checkpoint of `output_dir`."""
        if resume_from_checkpoint is True:
            found = last_good_checkpoint(Path(str(self.args.output_dir)))
            if found is None:
                raise TrainingError(f"no whole checkpoint to resume from in {self.args.output_dir}")
            resume_from_checkpoint = str(found)
        self._regularizers.clear()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Older checkpoints go only once this one counts, so rotation waits until it is sealed.
        run_directory = Path(self._get_output_dir(trial))
        folder = run_directory / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and folder.exists():
            shutil.rmtree(folder)  # what a crashed run left
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if not self.args.should_save:
            return
        state = adapted_model(self).adapter_state()
        if state:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
            save_file(tensors, folder / ADAPTER_STATE, metadata={"format": "pt"})
        seal_checkpoint(folder)
        rotate_checkpoints(
            output_dir=str(run_directory),
            save_total_limit=limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._load_adapters(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self._load_adapters(Path(str(self.state.best_model_checkpoint)))

    def finish_from(self, checkpoint: Path) -> None:
        """Take over a run that is finished and whose last checkpoint this is: its state, and its best adapter."""
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))
        self._load_best_model()

    def _load_adapters(self, checkpoint: Path) -> None:
        model = adapted_model(self)
        file = checkpoint / ADAPTER_STATE
        state = load_file(file) if file.exists() else {}
        model.load_adapter_state(state)  # first, because it may say how many triplets the saved weights hold
        for name in model.peft_config:
            model.load_adapter_weights(checkpoint if name == "default" else checkpoint / name, name)
        model.load_adapter_state(state)  # again, because saving drops what a mask hides and training goes on with it


class AdapterTrainer(AdapterTrainerMixin, Trainer):
    """transformers' Trainer for a PeftModel."""
