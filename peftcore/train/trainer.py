"""transformers' Trainer for adapters: label-only loss, regulariser, rank allocation, and resuming that is exact.

Everything about loops, schedules, precision and processes is transformers'. The mixin adds what an adapter needs and
what plain Trainer gets wrong for one:

- the loss of `peftcore.train.losses`, over the supervised tokens of the whole accumulated batch; in evaluation,
  over those of the whole set, keeping no logits;
- the adapters' regulariser, once per optimiser step, logged apart from the loss;
- batches of rows of like length, and packed ones, for models that keep the documents of a row apart;
- the adapters' work between steps (AdaLoRA's allocator), after the optimiser and before gradients are cleared;
- what a `FaultPolicy` says of batches that do not fit and losses that cannot be right, and loss scaling in float16;
- the reference of TRL's preference trainers: the model as it was when the trainer was made;
- checkpoints that are whole or do not count, from which a run goes on exactly, and one more when it is told to end.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from peftcore.bases.quantized import keep_quantized_weights_trainable
from peftcore.errors import TrainingError
from peftcore.train.batches import LengthGroupedSampler, RightPaddingCollator
from peftcore.train.fault_policy import FaultPolicy
from peftcore.train.objective import adapted_model
from peftcore.train.optimizers import check_optimizer, in_one_call
from peftcore.train.packing import PackedCollator, Packs, check_packable, uses_flash_attention
from peftcore.train.precision import scale_losses
from peftcore.train.processes import FollowParameters, ProcessesMixin
from peftcore.train.trainer_reference import TrainerReferenceMixin


class _StepCallback(TrainerCallback):
    """Tells the adapters that the optimiser has stepped, and has the states remembered that are rolled back to."""

    def __init__(self, trainer: "AdapterTrainerMixin") -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.take_snapshot()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.take_snapshot()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Gradients of a step that was skipped say nothing about importance.
        if self.trainer.step_was_taken():
            adapted_model(self.trainer).on_optimizer_step(state.global_step + 1, self.trainer.optimizer)


class AdapterTrainerMixin(ProcessesMixin, TrainerReferenceMixin):
    """For any Trainer class: `class MyTrainer(AdapterTrainerMixin, Trainer)`. The model is a PeftModel."""

    def __init__(self, *args: Any, faults: FaultPolicy | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.start_watching(FaultPolicy() if faults is None else faults)
        model = adapted_model(self)
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
            # A frozen embedding gives outputs without gradient, which a checkpointed block would take for constant.
            model.enable_input_require_grads()
        self._regularizers: list[Tensor] = []
        self.check_shardable(model)
        self.add_callback(_StepCallback(self))
        self.add_callback(FollowParameters(self))

    # -- batches -----------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Packs come in their own order; `train_sampling_strategy="group_by_length"` gives batches of like length."""
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if isinstance(dataset, Packs):
            return dataset.sampler(seed)
        if self.args.train_sampling_strategy != "group_by_length" or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(train_dataset)
        columns = getattr(dataset, "column_names", None) or ()
        column = self.args.length_column_name
        lengths = list(dataset[column]) if column in columns else [len(row["input_ids"]) for row in dataset]
        return LengthGroupedSampler(lengths, self.args.train_batch_size, seed)

    def _check_packing(self, model: nn.Module) -> None:
        collator: Any = self.data_collator
        if isinstance(self.train_dataset, Packs) and not isinstance(collator, PackedCollator):
            raise TrainingError(
                f"the training set comes in packs, which a {type(collator).__name__} cannot lay into rows; give "
                "data_collator=PackedCollator()"
            )
        if isinstance(collator, PackedCollator):
            check_packable(model)
            self.data_collator = replace(collator, varlen=collator.varlen or uses_flash_attention(model))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Trainer's; an evaluation's rows are padded where training's are packed, because they are counted."""
        collator: Any = self.data_collator
        if isinstance(collator, PackedCollator):
            self.data_collator = RightPaddingCollator(pad_token_id=0)
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator

    # -- optimiser ---------------------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Trainer's; its fused AdamW takes one call for all parameters where they are plain tensors."""
        trained = [p for p in adapted_model(self).parameters() if p.requires_grad]
        managed = self.is_fsdp_enabled or self.is_deepspeed_enabled or any(type(p) is not nn.Parameter for p in trained)
        given = self.optimizer_cls_and_kwargs
        if given is None and not managed:
            made = self.get_optimizer_cls_and_kwargs(self.args, adapted_model(self))
            self.optimizer_cls_and_kwargs = in_one_call(*made)
        try:
            return super().create_optimizer(model)
        finally:
            self.optimizer_cls_and_kwargs = given


class AdapterTrainer(AdapterTrainerMixin, Trainer):
    """transformers' Trainer for a PeftModel."""
