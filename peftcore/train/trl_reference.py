"""The reference model of trainers that have one: TRL's DPO, KTO, GRPO and RLOO.

TRL supports the model class of HF PEFT only. For any other class TRL loads the base model as the reference. That is the
wrong reference if training continues an adapter, because the model at the start of training is then not the base.
"""

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from peftcore.errors import TrainingError
from peftcore.model import PeftModel
from peftcore.train.reference import reference_model

PARAMETER = "ref_model"
"""TRL's name of a trainer's reference, as an argument and as an attribute."""


def takes_reference(base_classes: Sequence[type]) -> bool:
    """Return True if the base trainer's `__init__` has the argument `ref_model` for a reference model.

    Args:
        base_classes: The base trainer's class and its parents, in method resolution order.
    """
    return PARAMETER in _parameters(base_classes)


def with_reference(
    base_classes: Sequence[type], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the base trainer's arguments, with a frozen copy of the present model as the reference model.

    Args:
        base_classes: The base trainer's class and its parents, in method resolution order.
        args: Positional arguments of the base trainer.
        kwargs: Keyword arguments of the base trainer.

    Returns:
        An empty tuple, and all arguments by name. `args` and `kwargs` are returned unchanged if the trainer has no
        argument `ref_model`, if a reference model was given, if the model has no adapters, or if the reference's
        log-probabilities are precomputed.
    """
    names = _parameters(base_classes)
    arguments = dict(zip(names, args, strict=False)) | kwargs
    if PARAMETER not in names or arguments.get(PARAMETER) is not None or not _needs_reference(arguments):
        return args, kwargs
    reference = reference_model(arguments["model"], share_base=not _changes_base(arguments.get("args")))
    return (), arguments | {PARAMETER: reference}


def _parameters(base_classes: Sequence[type]) -> list[str]:
    owner = next(each for each in base_classes if "__init__" in vars(each))
    return list(inspect.signature(owner).parameters)


def _needs_reference(arguments: dict[str, Any]) -> bool:
    """Return False if the model has no adapters, or if the reference's log-probabilities are precomputed."""
    precomputed = getattr(arguments.get("args"), "precompute_ref_log_probs", False)
    return isinstance(arguments.get("model"), PeftModel) and not precomputed


def _changes_base(training_arguments: Any) -> bool:
    """Return True if the trainer changes or shards the reference's weights."""
    if training_arguments is None:
        return False
    sharded = training_arguments.fsdp_plugin_args is not None or training_arguments.deepspeed_plugin is not None
    return sharded or getattr(training_arguments, "sync_ref_model", False)


def replace_loaded_reference(trainer: Any) -> None:
    """Turn the bare base that a trainer has loaded as its reference into a copy of the model as it is now.

    The object stays the same, because the trainer has replaced its forward and passed the object to callbacks.

    Raises:
        TrainingError: The trainer has sharded the reference.
    """
    if not isinstance(getattr(trainer, PARAMETER, None), nn.Module):
        return
    model, loaded = (trainer.accelerator.unwrap_model(each) for each in (trainer.model, trainer.ref_model))
    if not isinstance(model, PeftModel) or isinstance(loaded, PeftModel):
        return
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise TrainingError(
            f"{type(trainer).__name__} has sharded its reference, which is the bare base instead of the model with "
            "its adapter; train data parallel (DDP), merge the adapter first, or set beta=0"
        )
    assert isinstance(model, nn.Module)
    replaced_forward = vars(model).pop("forward", None)
    try:
        reference = reference_model(model, not _changes_base(trainer.args))
    finally:
        if replaced_forward is not None:
            vars(model)["forward"] = replaced_forward
    loaded_forward = {name: value for name, value in vars(loaded).items() if name == "forward"}
    loaded.__class__ = type(reference)
    vars(loaded).clear()
    vars(loaded).update({**vars(reference), **loaded_forward})
