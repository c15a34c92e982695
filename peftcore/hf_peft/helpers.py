"""`peft.helpers`: tools around a model with adapters."""

import contextlib
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from peftcore.errors import ConfigError
from peftcore.hf_peft.classes import check_if_peft_model
from peftcore.hf_peft.kappa import KappaTuneSelector, find_kappa_target_modules
from peftcore.hf_peft.reexports import reexported
from peftcore.injection.adapter_set import ATTRIBUTE, adapter_set

__all__ = [
    "DoraCaching",
    "KappaTuneSelector",
    "MontecloraTrainerMixin",
    "check_if_peft_model",
    "disable_input_dtype_casting",
    "find_kappa_target_modules",
    "rescale_adapter_scale",
    "update_forward_signature",
    "update_generate_signature",
    "update_signature",
]


class MontecloraTrainerMixin:
    """Add the regulariser of MonteCLoRA to the loss of a Trainer: `class MyTrainer(MontecloraTrainerMixin, Trainer)`.

    `peftcore.train.AdapterTrainer` adds the regularisers of all adapters by itself, and needs no mixin.
    """

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Return the Trainer's loss plus the regulariser of the active adapters, and the outputs if asked for.

        Args:
            model: the model that trains; it may be wrapped.
            inputs: a batch.
            return_outputs: True to return (loss, outputs).
            kwargs: further arguments of the Trainer's `compute_loss`.
        """
        result: Any = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)  # type: ignore[misc]
        models: list[Any] = [module for module in model.modules() if hasattr(module, "_get_monteclora_loss")]
        losses = [adapted._get_monteclora_loss() for adapted in models]
        added = sum(losses) / max(len(losses), 1)
        return (result[0] + added, result[1]) if return_outputs else result + added


@contextlib.contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Multiply the scaling of all adapters inside of the context.

    With a multiplier between 0 and 1 this is WiSE-FT (arXiv:2109.01903) between the base and the adapted model.

    Args:
        model: a model with adapters.
        multiplier: the factor.

    Raises:
        TypeError: `multiplier` is not a number.
        ConfigError: no adapter of the model has a scaling.
    """
    if not isinstance(multiplier, int | float) or isinstance(multiplier, bool):
        raise TypeError(f"multiplier must be a number; got {multiplier!r:.200}")
    slots = adapter_set(model).layers.values() if ATTRIBUTE in model.__dict__ else ()
    scaled: list[Any] = [
        slot.adapters[n] for slot in slots for n in slot.adapters if hasattr(slot.adapters[n], "scaling")
    ]
    if not scaled:
        raise ConfigError("rescale_adapter_scale: no adapter of this model has a scaling, as LoRA's do")
    original = [float(adapter.scaling) for adapter in scaled]
    for adapter in scaled:
        adapter.scaling *= multiplier
    try:
        yield
    finally:
        for adapter, scaling in zip(scaled, original, strict=True):
            adapter.scaling = scaling


@contextlib.contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Do nothing: peftcore never casts activations to the dtype of an adapter, so there is no cast to disable.

    Args:
        model: a model, or a part of it such as one layer.
        active: True or False, with the same result.

    Raises:
        TypeError: `active` is not True or False.
    """
    if not isinstance(active, bool):
        raise TypeError(f"disable_input_dtype_casting: active must be True or False; got {active!r:.200}")
    yield


class DoraCaching:
    """Context in which DoRA's weight norms are kept. In peftcore they always are, until a weight changes.

    `DoraCaching()(enabled=True)` is HF PEFT's call outside of a context.

    Args:
        enabled: True; False gives a warning, because there is no way to do without. Outputs are the same.
    """

    def __init__(self, enabled: bool = True):
        self(enabled)

    def __call__(self, enabled: bool = True) -> None:
        """Warn if `enabled` is False."""
        if not enabled:
            warnings.warn(
                "DoraCaching: enabled=False has no effect; the weight norms are always kept until a weight changes",
                stacklevel=3,
            )

    def __enter__(self) -> "DoraCaching":
        return self

    def __exit__(self, *exc: Any) -> None:
        pass


def _has_own_signature(model: nn.Module, method: str = "all") -> None:
    """Check that `method` names a method; a model with adapters has the signatures of its base already.

    Args:
        model: a model with adapters.
        method: "forward", "generate" or "all".

    Raises:
        ValueError: `method` is another word.
        AdapterNameError: the model has no adapters.
    """
    adapter_set(model)
    if method not in ("forward", "generate", "all"):
        raise ValueError(f"method must be 'forward', 'generate' or 'all'; got {method!r:.200}")


update_signature = _has_own_signature
update_forward_signature = partial(_has_own_signature, method="forward")
update_generate_signature = partial(_has_own_signature, method="generate")


def __getattr__(name: str) -> Any:
    return reexported(__name__, name)
