"""Several processes: data parallel (DDP) and sharded (FSDP2) training, equal to training in one process.

P processes that accumulate A forward passes take the steps of one process that accumulates P·A: they deal out the same
batches in the same order, and the loss is a mean over the supervised tokens of all of them. Trainer lacks for this:

- a last round of fewer than P batches is filled up with a row without labels and weights; accelerate would repeat rows;
- DDP learns of parameters that a method replaces in training (AdaLoRA, when its budget is final);
- DDP sends buffers only once; `PeftModel` excludes the frozen base from DDP;
- sharded adapters are gathered before they are saved, and the base is not saved.
"""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from peftcore.adapter import Adapter
from peftcore.errors import TrainingError
from peftcore.injection.adapter_set import adapter_set
from peftcore.train.batches import WEIGHT
from peftcore.train.losses import IGNORED


class EpochShard(BatchSamplerShard):
    """accelerate's shard that passes `set_epoch` on to its samplers.

    Otherwise a resumed run would repeat the order of the first epoch.
    """

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (from 0) whose order comes next; the trainer calls this method."""
        batches: Any = self.batch_sampler
        samplers: list[Any] = [batches, getattr(batches, "sampler", None)]
        for sampler in samplers:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)


class EvenShard(EpochShard):
    """One process's batches of an epoch: every P-th batch, the same number in each process, no row twice.

    If the last round has fewer than P batches, a process without a batch gets the epoch's first row; its labels
    and weights are removed later.
    """

    @property
    def is_filled_up(self) -> bool:
        """True if this process's last batch is a filler: the last round has too few batches for all processes."""
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


class Processes:
    """Batches, DDP and FSDP of one of several training processes; a single process is not changed."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._shard: EvenShard | None = None
        self._trained: list[nn.Parameter] = []

    # -- batches -------------------------------------------------------------------------------------------------

    def shard_evenly(self, loader: Any) -> Any:
        """Return a training data loader that shows each row once an epoch, in one process."""
        shard = getattr(loader, "batch_sampler", None)
        self._shard = None
        if type(shard) is BatchSamplerShard:
            even = not shard.split_batches and not shard.drop_last and self._ignores_rows_without_labels()
            shard.__class__ = EvenShard if even else EpochShard  # a loader's batch sampler cannot be replaced
            self._shard = shard if isinstance(shard, EvenShard) else None
        return loader

    def _ignores_rows_without_labels(self) -> bool:
        trainer = self.trainer
        return trainer.args.average_tokens_across_devices and trainer.training_objective.is_sum_over_items()

    def without_repeated_rows(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield the batches, the last one without labels and weights if it only fills up the last round."""
        for batch in batches:
            last = self.trainer.accelerator.gradient_state.end_of_dataloader
            if last and self._shard is not None and self._shard.is_filled_up:
                blanks = {name: value for name, value in (("labels", IGNORED), (WEIGHT, 0)) if name in batch}
                batch = {**batch, **{name: torch.full_like(batch[name], value) for name, value in blanks.items()}}
            yield batch

    def of_each(self, value: Any) -> list[Any]:
        """Return the value of each process by its index. A collective call."""
        return gather_object([value]) if self.trainer.accelerator.num_processes > 1 else [value]

    def share_of(self, values: list[Any]) -> list[Any]:
        """Return this process's share of the values that `of_each` gave to a run with any number of processes."""
        accelerator = self.trainer.accelerator
        return values[accelerator.process_index :: accelerator.num_processes]

    # -- data parallel -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Remember the trained parameters, and send buffers no more. Called when training begins."""
        self._trained = self._optimized()
        self._stop_sending_buffers()

    def follow_parameters(self) -> None:
        """Wrap the model in DDP again if an adapter has replaced trained parameters in this optimiser step."""
        trained = self._optimized()
        if len(trained) == len(self._trained) and all(a is b for a, b in zip(trained, self._trained, strict=True)):
            return
        self._trained = trained
        wrapped = self.trainer.model_wrapped
        if isinstance(wrapped, DistributedDataParallel):
            self._wrap_again(wrapped)
            self._stop_sending_buffers()

    def _optimized(self) -> list[nn.Parameter]:
        return [parameter for group in self.trainer.optimizer.param_groups for parameter in group["params"]]

    def _wrap_again(self, wrapped: DistributedDataParallel) -> None:
        # In place, because the training loop holds this object; its hooks on the old parameters go with its reducer.
        handler = self.trainer.accelerator.ddp_handler
        kwargs: dict[str, Any] = {} if handler is None else handler.to_kwargs()
        kwargs |= {"device_ids": wrapped.device_ids, "process_group": wrapped.process_group}
        DistributedDataParallel.__init__(wrapped, wrapped.module, **kwargs)
        if handler is not None:
            handler.register_comm_hook(wrapped)

    def _stop_sending_buffers(self) -> None:
        wrapped: Any = self.trainer.model_wrapped
        if isinstance(wrapped, DistributedDataParallel) and self.trainer.args.ddp_broadcast_buffers is None:
            # after the first broadcast; the attribute's name depends on torch's version
            wrapped.forward_sync_buffers = wrapped.broadcast_buffers = False

    # -- sharded parameters --------------------------------------------------------------------------------------

    def check_shardable(self, model: nn.Module) -> None:
        """Raise TrainingError if FSDP would shard a method that changes whole parameters between steps."""
        adapters = adapter_set(model)
        changing = {name for name, kind in adapters.kinds.items() if issubclass(kind, Adapter) and _acts_on_step(kind)}
        if self.trainer.is_fsdp_enabled and changing:
            methods = ", ".join(sorted(adapters.configs[name].method for name in changing))
            raise TrainingError(
                f"{methods} changes whole parameters between steps, but with FSDP each process holds only a part of "
                "them; train it data parallel (DDP), or train another method sharded"
            )

    def save_sharded(self, folder: Path) -> None:
        """Gather the sharded adapters, and write them, the tokenizer and the training arguments to `folder`.

        All processes must call this method; only the process that saves writes the files.
        """
        trainer = self.trainer
        self.reshard()
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder)
        if not trainer.args.should_save:
            return
        if trainer.processing_class is not None:
            trainer.processing_class.save_pretrained(folder)
        torch.save(trainer.args, folder / "training_args.bin")

    def save_sharded_optimizer(self, folder: str) -> None:
        """Gather the sharded optimiser state from all processes, and write it with the schedule in the first one."""
        from accelerate.utils import save_fsdp_optimizer

        trainer = self.trainer
        plugin = trainer.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, trainer.accelerator, trainer.optimizer, trainer.model, folder)
        if trainer.args.should_save:
            torch.save(trainer.lr_scheduler.state_dict(), Path(folder) / "scheduler.pt")

    def reshard(self) -> None:
        """Free the full parameters that FSDP has gathered, before weights are written or loaded.

        An evaluation may leave full copies beside the shards. A later change of the shards would not reach the copies.
        """
        if self.trainer.is_fsdp_enabled:
            for module in self.trainer.accelerator.unwrap_model(self.trainer.model).modules():
                if isinstance(module, FSDPModule):
                    module.reshard()


@contextmanager
def unused_parameters_allowed(args: Any) -> Iterator[None]:
    """Let DDP look for unused parameters by default: an adapter may be inactive, or no row routed to it."""
    before = args.ddp_find_unused_parameters
    args.ddp_find_unused_parameters = True if before is None else before
    try:
        yield
    finally:
        args.ddp_find_unused_parameters = before


def _acts_on_step(kind: type[Adapter]) -> bool:
    return kind.on_step.__func__ is not Adapter.on_step.__func__  # type: ignore[attr-defined]
