"""Resuming and `load_best_model_at_end` of plain `transformers.Trainer` for models with adapters.

Trainer saves adapters through `save_pretrained`, but where it reads a checkpoint it asks for HF PEFT's class and
otherwise for whole models' files: without this module a run with `load_best_model_at_end` fails after its last step.
transformers has no hook there, so its two methods that read a checkpoint are wrapped. For any other model they do what
they did. `peftcore.train.AdapterTrainerMixin` has methods of its own, which also resume exactly what Trainer does not
keep.

Trainer is not imported for this, because it takes long and serving needs none of it: the methods are wrapped when a
model gets its adapters and when it is put into training mode, if Trainer is there by then.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from peftcore import checkpoint
from peftcore.adapter_set import ATTRIBUTE, adapter_set
from peftcore.errors import CheckpointError

_WRAPPED = "reads_adapters"
"""Attribute of a method that is wrapped already."""


def teach_trainer() -> None:
    """Let transformers' Trainer read checkpoints of adapters, if it has been imported; once is enough."""
    trainer: Any = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    if trainer is None or hasattr(trainer._load_best_model, _WRAPPED):
        return
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
            "go on from its checkpoint; use peftcore.train.AdapterTrainer, or AdapterTrainerMixin over your trainer"
        )
    _read(adapted, Path(resume_from_checkpoint))


def _has_training_state(model: nn.Module, name: str) -> bool:
    return any(adapter.training_state() for adapter in adapter_set(model).adapters(name).values())


def _read(model: nn.Module, folder: Path) -> None:
    for name in adapter_set(model).configs:
        checkpoint.load_adapter_weights(model, folder if name == "default" else folder / name, name)
