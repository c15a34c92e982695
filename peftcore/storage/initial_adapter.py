"""Saving a LoRA as a plain LoRA of the original base, if its initial product was subtracted from the base.

PiSSA and OLoRA subtract the initial product s·B₀A₀ from the base. HF PEFT's option
`path_initial_model_for_weight_conversion` names the initial adapter. The saved adapter is a LoRA of rank 2r that fits
the original base: s(BA − B₀A₀) = s [B, −B₀] [A; A₀].
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from peftcore.config import PeftConfig
from peftcore.errors import CheckpointError, ConfigError
from peftcore.files.tensors import read_tensors
from peftcore.injection.adapter_set import adapter_set
from peftcore.methods.lora import Lora
from peftcore.storage.adapter_state import adapter_state_of


@contextlib.contextmanager
def start_subtracted(model: nn.Module, name: str, directory: str | os.PathLike[str]) -> Iterator[None]:
    """Make a LoRA subtract its initial product inside the context, so that it is saved as a plain LoRA of rank 2r.

    A LoRA that already subtracts its initial product is not changed, because peftcore always saves it with rank 2r.

    Args:
        model: The model with the adapter.
        name: The adapter.
        directory: The adapter as it was saved before training.

    Raises:
        ConfigError: If one of the two adapters is no LoRA, or the LoRA has variants that act on the layer (DoRA).
        CheckpointError: If there is no adapter in the directory, or its tensors do not fit.
    """
    adapters = adapter_set(model)
    initial = PeftConfig.from_pretrained(directory)
    if adapters.kinds[name] is not Lora or initial.peft_type != "LORA":
        raise ConfigError(
            "path_initial_model_for_weight_conversion: only a LORA has a start to subtract; got "
            f"{adapters.configs[name].method} and {initial.method}"
        )
    loras = cast(dict[str, Lora], adapters.of_method(name))
    if any(lora.start is not None for lora in loras.values()):
        yield
        return
    if variants := {variant.option for lora in loras.values() for variant in lora.variants}:
        raise ConfigError(
            f"path_initial_model_for_weight_conversion: a LORA with {min(variants)} is no difference of two LoRAs; "
            "leave the argument out"
        )
    starts = _starts(model, name, Path(directory))
    try:
        for lora, (a, b) in starts:
            lora.start_A, lora.start_B = a, b
        yield
    finally:
        for lora, _ in starts:
            lora.start_A = lora.start_B = None


def _starts(model: nn.Module, name: str, directory: Path) -> list[tuple[Lora, tuple[Tensor, Tensor]]]:
    state = adapter_state_of(adapter_set(model), name)
    tensors = state.with_our_keys(read_tensors(directory), state.tensors(), name)
    starts = []
    for prefix, adapter, _ in state.entries:
        if not isinstance(adapter, Lora) or adapter.source is not None:
            continue
        keys = [f"{prefix}{key}" for key in list(adapter.checkpoint_keys().values())[:2]]
        parts = [tensors.get(key) for key in keys]
        for key, part, own in zip(keys, parts, adapter.own_factors(), strict=True):
            if part is None or part.shape != own.shape:
                seen = "is absent" if part is None else f"has the shape {list(part.shape)}"
                raise CheckpointError(
                    f"{directory}: {key} {seen}, and {list(own.shape)} fits; give the adapter that was saved before "
                    "the training of this one"
                )
        # in the start's own dtype: the base lost exactly this product, whatever the dtype of the trained adapter
        starts.append((adapter, tuple(part.to(adapter.lora_A_weight.device) for part in parts if part is not None)))
    return starts
