"""Resuming and `load_best_model_at_end` of plain `transformers.Trainer` for models with adapters.

Trainer saves adapters through `save_pretrained`. When Trainer reads a checkpoint, it expects HF PEFT's class or the
files of a whole model, so `load_best_model_at_end` would fail after the last step. transformers has no hook for this.
Therefore the two methods of Trainer that read a checkpoint are wrapped; for other models they behave as before.
`peftcore.train.AdapterTrainerMixin` has its own methods, which also restore state that Trainer does not save.

Importing Trainer takes long, and serving does not need it. The methods are wrapped when a model gets its adapters, or
when Trainer is imported later.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from peftcore._util.after_import import after_import
from peftcore.errors import CheckpointError
from peftcore.injection.adapter_set import ATTRIBUTE, adapter_set
from peftcore.injection.inject import keeps_class
from peftcore.storage import checkpoint

_WRAPPED = "reads_adapters"
"""Attribute that marks a wrapped method."""


def teach_trainer() -> None:
    """Let transformers' Trainer read checkpoints of adapters, now or as soon as Trainer is imported."""
    after_import("transformers.trainer", "Trainer", _wrap_methods)


def _wrap_methods(module: Any) -> None:
    trainer = module.Trainer
    if not hasattr(trainer._load_best_model, _WRAPPED):
        trainer._load_best_model = _wrapped(trainer._load_best_model, _load_best)
        trainer._load_from_checkpoint = _wrapped(trainer._load_from_checkpoint, _resume)


def _wrapped(original: Callable[..., Any], ours: Callable[..., None]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = self.accelerator.unwrap_model(self.model)
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if sharded or not isinstance(model, nn.Module) or ATTRIBUTE not in model.__dict__:
            return original(self, *args, **kwargs)
        return ours(self, model, *args, **kwargs)

    setattr(method, _WRAPPED, True)
    return method


def _load_best(trainer: Any, model: nn.Module) -> None:
    _read(model, Path(str(trainer.state.best_model_checkpoint)))


def _resume(trainer: Any, adapted: nn.Module, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
    with_state = sorted(name for name in adapter_set(adapted).configs if _has_training_state(adapted, name))
    if with_state:
        raise CheckpointError(
            f"{', '.join(with_state)}: this method has training state that Trainer does not save, so training cannot "
            "be resumed from its checkpoint; use peftcore.train.AdapterTrainer, or AdapterTrainerMixin in your trainer"
        )
    _read(adapted, Path(resume_from_checkpoint))


def _has_training_state(model: nn.Module, name: str) -> bool:
    return any(adapter.training_state() for adapter in adapter_set(model).adapters(name).values())


def _read(model: nn.Module, folder: Path) -> None:
    if keeps_class(model):  # transformers saves the active adapter alone, in the folder itself
        checkpoint.load_adapter_weights(model, folder, adapter_set(model).selection.active[0])
        return
    for name in adapter_set(model).configs:
        checkpoint.load_adapter_weights(model, folder if name == "default" else folder / name, name)
