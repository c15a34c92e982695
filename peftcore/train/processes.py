"""Several processes inside transformers' Trainer: data parallel (DDP) and sharded (FSDP2), equal to one process.

P processes that accumulate A forward passes take the steps of one process that accumulates P·A: the same batches in the
same order, dealt out in turn, the loss over the supervised tokens of all of them. What that needs beside Trainer:

- a last round of fewer than P batches is filled up with a row without labels, where accelerate repeats rows;
- DDP learns of parameters that a method replaces in training (AdaLoRA, when its budget is final);
- what no process changes is not sent: `PeftModel` names the frozen base to DDP, and buffers only once;
- sharded adapters are saved whole, and only they: the base is where it came from.
"""

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback

from peftcore.adapter import Adapter
from peftcore.errors import TrainingError
from peftcore.injection.adapter_set import adapter_set
from peftcore.train.losses import IGNORED
from peftcore.train.resume import ResumeMixin


class EpochShard(BatchSamplerShard):
    """accelerate's, which passes the epoch on: a run resumed in a later one would else see the first one's order."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (from 0) whose order comes next; the trainer calls it."""
        batches: Any = self.batch_sampler
        found: list[Any] = [batches, getattr(batches, "sampler", None)]
        for drawn in found:
            if hasattr(drawn, "set_epoch"):
                drawn.set_epoch(epoch)


class EvenShard(EpochShard):
    """One process's batches of an epoch: every P-th, each row in one process alone, as many for each process.

    Where the last round has fewer than P batches, a process without one gets the epoch's first row, to be blanked.
    """

    @property
    def is_filled_up(self) -> bool:
        """Whether this process's last batch is such a row."""
        last_round = len(self.batch_sampler) % self.num_processes
        return 0 < last_round <= self.process_index

    def __len__(self) -> int:
        return -(-len(self.batch_sampler) // self.num_processes)

    def __iter__(self) -> Generator[list[Any], None, None]:
        first: list[Any] = []
        for number, batch in enumerate(self.batch_sampler):
            first = first or batch[:1]
            if number % self.num_processes == self.process_index:
                yield batch
        if self.is_filled_up:
            yield first


class FollowParameters(TrainerCallback):
    """Keeps DDP averaging what is trained, and from sending each forward what does not change."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.trained: list[nn.Parameter] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trained = self._of_optimizer()
        self._keep_buffers()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = self._of_optimizer()
        if len(now) == len(self.trained) and all(a is b for a, b in zip(now, self.trained, strict=True)):
            return
        self.trained = now
        wrapped = self.trainer.model_wrapped
        if isinstance(wrapped, DistributedDataParallel):
            self._wrap_again(wrapped)
            self._keep_buffers()

    def _of_optimizer(self) -> list[nn.Parameter]:
        optimizer: Any = self.trainer.optimizer
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def _wrap_again(self, wrapped: DistributedDataParallel) -> None:
        # In place, because the training loop holds this object; its hooks on the old parameters go with its reducer.
        handler = self.trainer.accelerator.ddp_handler
        kwargs: dict[str, Any] = {} if handler is None else handler.to_kwargs()
        kwargs |= {"device_ids": wrapped.device_ids, "process_group": wrapped.process_group}
        DistributedDataParallel.__init__(wrapped, wrapped.module, **kwargs)
        if handler is not None:
            handler.register_comm_hook(wrapped)

    def _keep_buffers(self) -> None:
        wrapped: Any = self.trainer.model_wrapped
        if isinstance(wrapped, DistributedDataParallel) and self.trainer.args.ddp_broadcast_buffers is None:
            # after the first broadcast; torch's name for it has changed
            wrapped.forward_sync_buffers = wrapped.broadcast_buffers = False


class ProcessesMixin(ResumeMixin):
    """What AdapterTrainerMixin needs where it is one of several processes; of one, it changes nothing."""

    _shard: EvenShard | None = None
    """Which batches of the epoch are this process's."""

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        # Trainer's own choice, also with checkpointed activations: an adapter may be idle, or no row routed to it.
        given = self.args.ddp_find_unused_parameters
        self.args.ddp_find_unused_parameters = True if given is None else given
        try:
            return super()._build_accelerator_args(**kwargs)
        finally:
            self.args.ddp_find_unused_parameters = given

    # -- batches -------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        """Trainer's; where rows without labels add nothing to the loss, each row is in one process, once an epoch."""
        loader: Any = super().get_train_dataloader()
        shard = getattr(loader, "batch_sampler", None)
        self._shard = None
        if type(shard) is BatchSamplerShard:
            even = not shard.split_batches and not shard.drop_last and self._adds_up()
            shard.__class__ = EvenShard if even else EpochShard  # a loader's batch sampler cannot be replaced
            self._shard = shard if isinstance(shard, EvenShard) else None
        return loader

    def _adds_up(self) -> bool:
        """Whether the loss is a sum over the labelled tokens of all processes, by their number."""
        return self.args.average_tokens_across_devices and self._computes_label_only_loss()

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Trainer's, with no labels in what only keeps this process in step with the others."""
        return super().get_batch_samples(self._with_blanks(epoch_iterator), num_batches, device)

    def _with_blanks(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            last = self.accelerator.gradient_state.end_of_dataloader
            if last and self._shard is not None and self._shard.is_filled_up:
                batch = {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}
            yield batch

    # -- sharded parameters --------------------------------------------------------------------------------------

    def check_shardable(self, model: nn.Module) -> None:
        """Raise TrainingError for a method that needs whole parameters between steps, where they would be sharded."""
        adapters = adapter_set(model)
        moving = {name for name, kind in adapters.kinds.items() if issubclass(kind, Adapter) and _acts_on_step(kind)}
        if self.is_fsdp_enabled and moving:
            methods = ", ".join(sorted(adapters.configs[name].peft_type for name in moving))
            raise TrainingError(
                f"{methods} changes whole parameters between steps, and FSDP leaves each process a part of them; train "
                "it data parallel (DDP), or another method sharded"
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's; adapters that are sharded are put together by all processes and written by the first."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(str(self.args.output_dir if output_dir is None else output_dir))
        self._reshard()
        model: Any = self.accelerator.unwrap_model(self.model)
        model.save_pretrained(folder)
        if not self.args.should_save:
            return
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        from accelerate.utils import save_fsdp_optimizer

        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            scheduler: Any = self.lr_scheduler
            torch.save(scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_adapters(self, checkpoint: Path) -> None:
        self._reshard()
        super()._load_adapters(checkpoint)

    def _reshard(self) -> None:
        # After an evaluation some parameters still stand whole beside their shards, which would not see a change.
        if self.is_fsdp_enabled:
            for module in self.accelerator.unwrap_model(self.model).modules():
                if isinstance(module, FSDPModule):
                    module.reshard()


def _acts_on_step(kind: type[Adapter]) -> bool:
    return kind.on_step.__func__ is not Adapter.on_step.__func__  # type: ignore[attr-defined]
