"""The reference model of trainers that have one: TRL's, for DPO, KTO, GRPO, RLOO.

TRL knows HF PEFT's class only. For any other it loads the bare base as the reference, which is another model than the
one that training starts from as soon as the adapter is a trained one.
"""

import inspect
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import Trainer

from peftcore.errors import TrainingError
from peftcore.model import PeftModel
from peftcore.train.reference import reference_model

PARAMETER = "ref_model"
"""TRL's name for a trainer's reference, as an argument and as an attribute."""

_Base = Trainer if TYPE_CHECKING else object


class TrainerReferenceMixin(_Base):
    """The part of AdapterTrainerMixin that makes the model, as it is now, the reference of a trainer without one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        names = self._trainers_parameters()
        given = dict(zip(names, args, strict=False)) | kwargs
        if PARAMETER in names and given.get(PARAMETER) is None and _needs_reference(given):
            made = reference_model(given["model"], share_base=not _changes_base(given.get("args")))
            args, kwargs = (), given | {PARAMETER: made}
        super().__init__(*args, **kwargs)
        if PARAMETER not in names and isinstance(getattr(self, PARAMETER, None), nn.Module):
            _replace_loaded(self)

    def _trainers_parameters(self) -> list[str]:
        """Names of what the trainer below this mixin takes, in order."""
        classes = type(self).__mro__
        below = classes[classes.index(TrainerReferenceMixin) + 1 :]
        made_by = next(each for each in below if "__init__" in vars(each))
        return list(inspect.signature(made_by).parameters)


def _needs_reference(given: dict[str, Any]) -> bool:
    """Whether a trainer would load one; what is computed before training is computed by the model itself."""
    precomputed = getattr(given.get("args"), "precompute_ref_log_probs", False)
    return isinstance(given.get("model"), PeftModel) and not precomputed


def _changes_base(arguments: Any) -> bool:
    """Whether the reference's weights are changed or sharded by the trainer."""
    if arguments is None:
        return False
    sharded = arguments.fsdp_plugin_args is not None or arguments.deepspeed_plugin is not None
    return sharded or getattr(arguments, "sync_ref_model", False)


def _replace_loaded(trainer: Any) -> None:
    """Turn the bare base that a trainer has loaded for its reference into the model as it is now.

    The object stays, because the trainer has replaced its forward and given it to callbacks.
    """
    model, loaded = (trainer.accelerator.unwrap_model(each) for each in (trainer.model, trainer.ref_model))
    if not isinstance(model, PeftModel) or isinstance(loaded, PeftModel):
        return
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise TrainingError(
            f"{type(trainer).__name__} has sharded its reference, which is the bare base, where it should be the model "
            "with its adapter; train data parallel (DDP), merge the adapter first, or set beta=0"
        )
    assert isinstance(model, nn.Module)
    replaced = vars(model).pop("forward", None)
    try:
        made = reference_model(model, not _changes_base(trainer.args))
    finally:
        if replaced is not None:
            vars(model)["forward"] = replaced
    own = {name: value for name, value in vars(loaded).items() if name == "forward"}
    loaded.__class__ = type(made)
    vars(loaded).clear()
    vars(loaded).update({**vars(made), **own})
