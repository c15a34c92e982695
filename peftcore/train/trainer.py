"""transformers' Trainer for models with adapters.

`AdapterTrainerMixin` overrides methods of Trainer (in this file only), and each override calls a collaborator:

| attribute | file | task |
|---|---|---|
| `training_objective` | objective.py | loss of a step over supervised tokens, metrics of an evaluation set |
| `regularizer` | regularizer.py | adapters' regulariser, once per optimiser step, logged apart from the loss |
| `splitter` | out_of_memory.py | a batch that does not fit into memory is computed in parts |
| `guard` | step_guard.py | a bad loss stops the run or rolls it back; float16 overflows are counted |
| `termination` | termination.py | SIGTERM: save, exit, resume later |
| `resume` | resume.py | complete checkpoints, exact resumption |
| `processes` | processes.py | DDP and FSDP2 |

Order of calls:

    step     training_step -> splitter -> compute_loss -> regularizer -> backward -> guard -> optimiser -> adapters
    after    _maybe_log_save_evaluate: log, evaluate, save; after SIGTERM: log, save, exit
    save     resume.checkpoint: Trainer's files, run state, adapter state, manifest; then delete old checkpoints
    resume   resume.choose -> load_checkpoint -> restore_run_state, with the evaluation that SIGTERM postponed

Trainer keeps the loop, the schedule, mixed precision and logging.
"""

import math
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState

from peftcore.bases.quantized import keep_quantized_weights_trainable
from peftcore.errors import TrainingError
from peftcore.injection.forward_hooks import without_regularizers
from peftcore.model import PeftModel
from peftcore.train.batches import LengthGroupedSampler, RightPaddingCollator
from peftcore.train.checkpoints import TRAINER_STATE, copy_adapters, is_finished
from peftcore.train.evaluation import evaluate_rows, random_states_preserved
from peftcore.train.fault_policy import FaultPolicy
from peftcore.train.objective import Objective, TokenObjective
from peftcore.train.optimizers import check_optimizer, in_one_call
from peftcore.train.out_of_memory import BatchSplitter
from peftcore.train.packing import PackedCollator, Packs, check_packable, uses_flash_attention
from peftcore.train.precision import scale_losses, unscale_gradients
from peftcore.train.processes import Processes, unused_parameters_allowed
from peftcore.train.regularizer import Regularizer
from peftcore.train.resume import Resume
from peftcore.train.step_guard import StepGuard
from peftcore.train.termination import EvaluationStopped, Termination
from peftcore.train.trl_reference import replace_loaded_reference, takes_reference, with_reference

_Base = Trainer if TYPE_CHECKING else object


class _TrainingEvents(TrainerCallback):
    """Events of Trainer's loop, in the order in which they occur."""

    def __init__(self, trainer: "AdapterTrainerMixin") -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.guard.take_snapshot()
        self.trainer.processes.start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.termination.epoch_ended = False

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.guard.step_was_taken():  # gradients of a skipped step say nothing about importance
            self.trainer.adapted_model.on_optimizer_step(state.global_step + 1, self.trainer.optimizer)
        self.trainer.processes.follow_parameters()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.termination.epoch_ended = True

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.termination.interrupt_evaluation()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.termination.saved = True
        self.trainer.guard.take_snapshot()


class AdapterTrainerMixin(_Base):
    """Adapter training for any Trainer class: `class MyTrainer(AdapterTrainerMixin, SFTTrainer): ...`.

    The model is a PeftModel. All arguments but `faults` go to the base trainer. A base trainer with a reference model
    (TRL's DPO, KTO, GRPO, RLOO) gets the model as it is when the trainer is made.

    Args:
        faults: Actions on out-of-memory errors and bad losses.

    Raises:
        TrainingError: The model has no adapter or no trained parameter, or an argument does not fit the model.
    """

    termination_signals: ClassVar[Sequence[signal.Signals]] = (signal.SIGTERM,)
    """Signals after which `train` completes the present optimiser step, saves a checkpoint and raises
    SystemExit(128 + signal number). Empty: signals are left alone."""

    def __init__(self, *args: Any, faults: FaultPolicy | None = None, **kwargs: Any) -> None:
        self.faults = FaultPolicy() if faults is None else faults
        self.training_objective = self.make_objective()
        self.regularizer = Regularizer(self)
        self.resume = Resume(self)
        self.processes = Processes(self)
        base_classes = self.base_trainer_classes()
        args, kwargs = with_reference(base_classes, args, kwargs)
        super().__init__(*args, **kwargs)
        if not takes_reference(base_classes):
            replace_loaded_reference(self)
        self._start_run()
        self._prepare_model()
        self.training_objective.check()
        self.add_callback(_TrainingEvents(self))

    def make_objective(self) -> Objective:
        """Return the loss to train on; a subclass may return another one."""
        return TokenObjective(self)

    def _start_run(self) -> None:
        self.regularizer.values.clear()
        self.training_objective.reset()
        self.splitter = BatchSplitter(self)
        self.guard = StepGuard(self, self.faults)
        self.termination = Termination(self)

    def _prepare_model(self) -> None:
        model = self.adapted_model
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise TrainingError(
                "nothing to train: every parameter is frozen; load the adapter with is_trainable=True, or activate "
                "it with set_adapter"
            )
        check_optimizer(self.args)
        scale_losses(self.accelerator, model)
        self._check_packing(model)
        keep_quantized_weights_trainable(model)
        if getattr(self.args, "activation_checkpointing", False):
            # A frozen embedding's outputs need no gradient; a checkpointed block would treat them as constants.
            model.enable_input_require_grads()
        self.processes.check_shardable(model)

    @property
    def adapted_model(self) -> Any:
        """The PeftModel, without the wrappers of data parallelism. TrainingError if the model has no adapters."""
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, PeftModel):
            raise TrainingError(
                f"the model to train is a {type(model).__name__} without adapters; call get_peft_model on it first"
            )
        return model

    @classmethod
    def base_trainer_classes(cls) -> tuple[type, ...]:
        """Return the classes behind this mixin in the method resolution order, such as TRL's trainer and Trainer."""
        classes = cls.__mro__
        return classes[classes.index(AdapterTrainerMixin) + 1 :]

    # -- a run -------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer does, from the start or from a checkpoint.

        Args:
            resume_from_checkpoint: A checkpoint folder, or True for the last complete one of `output_dir`.
            args: Further arguments of Trainer.
            kwargs: Further arguments of Trainer.

        Raises:
            TrainingError: There is no complete checkpoint to resume from, or the named one is damaged.
            SystemExit: A signal of `termination_signals` has arrived; the run's last checkpoint is that of this step.
        """
        checkpoint = self.resume.choose(resume_from_checkpoint)
        self._start_run()
        with self.termination.listener:
            return super().train(checkpoint, *args, **kwargs)

    def _run_epoch(self, model: nn.Module, epoch: int, *args: Any, **kwargs: Any) -> None:
        self.resume.restore_run_state(epoch)
        if self.resume.run_is_complete():
            self.control.should_training_stop = True  # Trainer would notice only after one more step
        else:
            super()._run_epoch(model, epoch, *args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self.resume.restore_run_state(int(self.state.epoch or 0))  # if the checkpoint was the last, no epoch has run
        self.resume.delete_old_checkpoints()
        return super()._finalize_training(*args, **kwargs)

    # -- a step ------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Compute the gradients of a micro-batch, in parts if it does not fit into memory, and check the step's loss.

        Raises:
            TrainingError: A batch does not fit and cannot be split; or the step's loss is bad (see `FaultPolicy`), and
                the policy is to stop.
        """
        self.guard.start_micro_batch()
        loss = self.splitter.forward_backward(super().training_step, model, inputs, num_items_in_batch)
        return self.guard.check_loss(loss, num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the objective's loss, or the base trainer's if the objective does not apply; add the regulariser."""
        outputs: Any = {}
        with without_regularizers(self.adapted_model):
            loss = self.training_objective.loss(model, inputs, num_items_in_batch, return_outputs)
            if loss is None:
                result = super().compute_loss(
                    model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
                )
                loss, outputs = cast(tuple[Any, Any], result if return_outputs else (result, outputs))
        if model.training and self.accelerator.sync_gradients:
            loss = self.regularizer.add_to(loss, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | int | None:
        weight = self.training_objective.step_weight(batch_samples, device)
        return super()._get_num_items_in_batch(batch_samples, device) if weight is None else weight

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self.guard.rolled_back:
            return math.nan
        unscale_gradients(self.accelerator, self.optimizer)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if self.guard.rolled_back:
            return math.nan
        if grad_norm is None:
            unscale_gradients(self.accelerator, self.optimizer)
        return super()._get_grad_norm(model, grad_norm)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as Trainer does; a training record also has the regulariser, the objective's metrics and faults."""
        if "loss" in logs and "eval_loss" not in logs:
            logs |= self.training_objective.record() | self.guard.record() | self.regularizer.record()
        super().log(logs, start_time)

    # -- after a step: log, evaluate, save, end ----------------------------------------------------------------

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, epoch: Any, *args: Any, **kwargs: Any
    ) -> None:
        self.termination.start_actions()
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, epoch, *args, **kwargs)
        except EvaluationStopped:
            self.termination.postpone_evaluation()
        if self.termination.ends_run(epoch):
            if not self.termination.saved:
                self._save_checkpoint(model, trial)
            self.termination.exit(self._get_output_dir(trial))

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        with random_states_preserved():  # training continues as it would without this evaluation
            return super()._evaluate(*args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Evaluate as Trainer does; if only the loss is needed, return its mean over items, not over batches.

        Raises:
            TrainingError: Predictions are asked for, and the objective has none.
        """
        loss_only = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        if not loss_only and not self.training_objective.returns_outputs:
            raise TrainingError(
                f"{type(self).__name__} keeps no predictions for compute_metrics and predict; set "
                "prediction_loss_only=True in the training arguments, with which evaluate and predict return its own "
                "metrics, or call the model for predictions"
            )
        output = evaluate_rows(self, dataloader, metric_key_prefix) if loss_only else None
        if output is not None:
            return output
        return super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)

    # -- a checkpoint ------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self.resume.checkpoint(trial):
            super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapters as Trainer does; sharded adapters are gathered first."""
        if self.is_fsdp_enabled:
            self.processes.save_sharded(Path(str(self.args.output_dir if output_dir is None else output_dir)))
        else:
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled:
            self.processes.save_sharded_optimizer(output_dir)
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero():
            if not is_finished(Path(checkpoint_folder)):
                return  # Trainer calls this before the checkpoint is complete
            copy_adapters(Path(checkpoint_folder), Path(str(self.args.output_dir)))
        super()._push_from_checkpoint(checkpoint_folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.resume.load_checkpoint(Path(resume_from_checkpoint))

    def _load_callback_state(self) -> None:
        self.resume.load_callback_states()

    def _load_best_model(self) -> None:
        self.resume.load_adapters(Path(str(self.state.best_model_checkpoint)))

    def finish_from(self, checkpoint: Path) -> None:
        """Load the state and the best adapter of a complete run.

        Args:
            checkpoint: The run's last checkpoint.
        """
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))
        self._load_best_model()

    # -- data --------------------------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = self.training_objective.columns(cast(list[str], self._signature_columns))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Return packs for `Packs`, batches of similar length for "group_by_length", else Trainer's sampler."""
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if isinstance(dataset, Packs):
            return dataset.sampler(seed)
        if not self.groups_by_length(dataset):
            return super()._get_train_sampler(train_dataset)
        return LengthGroupedSampler(self.training_objective.lengths(dataset), self.args.train_batch_size, seed)

    def groups_by_length(self, dataset: Any) -> bool:
        """Return True if batches have rows of similar length."""
        return self.args.train_sampling_strategy == "group_by_length" and hasattr(dataset, "__len__")

    def _check_packing(self, model: nn.Module) -> None:
        collator: Any = self.data_collator
        if isinstance(self.train_dataset, Packs) and not isinstance(collator, PackedCollator):
            raise TrainingError(
                f"the training set consists of packs, which {type(collator).__name__} cannot collate; give "
                "data_collator=PackedCollator()"
            )
        if isinstance(collator, PackedCollator):
            check_packable(model)
            self.data_collator = replace(collator, varlen=collator.varlen or uses_flash_attention(model))

    def get_train_dataloader(self) -> Any:
        """Return Trainer's data loader; of several processes, each sees other rows."""
        return self.processes.shard_evenly(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return Trainer's data loader, with padded rows even if training packs them, because rows are counted."""
        collator: Any = self.data_collator
        if isinstance(collator, PackedCollator):
            self.data_collator = RightPaddingCollator(pad_token_id=0)
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Return the batches of an optimiser step; a row that only fills up the last round has no labels."""
        return super().get_batch_samples(self.processes.without_repeated_rows(epoch_iterator), num_batches, device)

    # -- optimiser and accelerator -----------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create Trainer's optimiser; fused AdamW updates all parameters in one call if they are plain tensors."""
        trained = [p for p in self.adapted_model.parameters() if p.requires_grad]
        managed = self.is_fsdp_enabled or self.is_deepspeed_enabled or any(type(p) is not nn.Parameter for p in trained)
        before = self.optimizer_cls_and_kwargs
        if before is None and not managed:
            class_and_options = self.get_optimizer_cls_and_kwargs(self.args, self.adapted_model)
            self.optimizer_cls_and_kwargs = in_one_call(*class_and_options)
        try:
            return super().create_optimizer(model)
        finally:
            self.optimizer_cls_and_kwargs = before

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        with unused_parameters_allowed(self.args):
            return super()._build_accelerator_args(**kwargs)


class AdapterTrainer(AdapterTrainerMixin, Trainer):
    """transformers' Trainer for a PeftModel."""
