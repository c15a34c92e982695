"""transformers' Trainer for adapters: label-only loss, regulariser, rank allocation, and resuming that is exact.

Everything about loops, schedules, precision and processes is transformers'. The mixin adds what an adapter needs and
what plain Trainer gets wrong for one:

- the loss of `peftcore.train.losses`, over the supervised tokens of the whole accumulated batch; in evaluation,
  over those of the whole set, keeping no logits;
- the adapters' regulariser, once per optimiser step, logged apart from the loss;
- batches of rows of like length, and packed ones, for models that keep the documents of a row apart;
- the adapters' work between steps (AdaLoRA's allocator), after the optimiser and before gradients are cleared;
- checkpoints that are whole or do not count, and from which adapters, averages and masks come back exactly.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import rotate_checkpoints

from peftcore.bases.quantized import keep_quantized_weights_trainable
from peftcore.errors import TrainingError
from peftcore.train.batches import LengthGroupedSampler, RightPaddingCollator
from peftcore.train.checkpoints import TRAINER_STATE, last_good_checkpoint, seal_checkpoint
from peftcore.train.objective import ObjectiveMixin, adapted_model
from peftcore.train.optimizers import check_optimizer, in_one_call
from peftcore.train.packing import PackedCollator, Packs, check_packable, uses_flash_attention

ADAPTER_STATE = "adapter_state.safetensors"
"""File of a checkpoint that holds what resuming needs beyond the adapters' saved weights."""


class _StepCallback(TrainerCallback):
    """Tells the adapters that the optimiser has stepped."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # With a gradient scaler a step is skipped when gradients overflow; they say nothing about importance then.
        if not self.trainer.accelerator.optimizer_step_was_skipped:
            adapted_model(self.trainer).on_optimizer_step(state.global_step + 1, self.trainer.optimizer)


class AdapterTrainerMixin(ObjectiveMixin):
    """For any Trainer class: `class MyTrainer(AdapterTrainerMixin, Trainer)`. The model is a PeftModel."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model = adapted_model(self)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise TrainingError(
                "nothing to train: every parameter is frozen; load the adapter with is_trainable=True, or activate "
                "it with set_adapter"
            )
        check_optimizer(self.args)
        self._check_packing(model)
        keep_quantized_weights_trainable(model)
        if getattr(self.args, "activation_checkpointing", False):
            # A frozen embedding gives outputs without gradient, which a checkpointed block would take for constant.
            model.enable_input_require_grads()
        self._regularizers: list[Tensor] = []
        self.add_callback(_StepCallback(self))

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
