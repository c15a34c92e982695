"""What a call of the whole model tells its adapters: one forward pre-hook, installed with the first adapter.

A hook and not an overridden `forward`, because accelerate and others replace `forward` on the instance.
"""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from peftcore.adapter import Adapter
from peftcore.adapter_set import ATTRIBUTE, AdapterSet
from peftcore.registry import method_of


def install(model: nn.Module) -> None:
    """Have acting adapters told of each forward of `model`."""
    model.register_forward_pre_hook(_before_forward, with_kwargs=True)


def remove(model: nn.Module) -> None:
    """Undo `install`."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if hook is _before_forward:
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)


def _before_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    adapters: AdapterSet | None = model.__dict__.get(ATTRIBUTE)
    names = [] if adapters is None else [name for name in adapters.configs if _is_told(adapters, name)]
    if adapters is None or not names:
        return None
    inputs = {**adapters.generating, **_by_name(model, args, kwargs)}
    taken = {argument for name in names for argument in method_of(adapters.configs[name]).adapter.forward_arguments}
    for key in taken & inputs.keys():
        inputs[key] = _for_each_row(inputs[key], inputs)
    for name in names:
        if name in adapters.selection.acting:
            config = adapters.configs[name]
            method_of(config).adapter.before_forward(config, adapters.adapters(name), model, inputs)
    return (), {key: value for key, value in inputs.items() if key not in taken}


def _is_told(adapters: AdapterSet, name: str) -> bool:
    kind = method_of(adapters.configs[name]).adapter
    return bool(kind.forward_arguments) or kind.before_forward.__func__ is not Adapter.before_forward.__func__


def _by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _for_each_row(value: Any, inputs: dict[str, Any]) -> Any:
    """A value given for each row of a batch, repeated for the beams that `generate` makes of a row."""
    tokens = next((inputs[k] for k in ("input_ids", "inputs_embeds") if inputs.get(k) is not None), None)
    if not isinstance(value, torch.Tensor) or tokens is None or not value.dim() or len(tokens) % len(value):
        return value
    return value.repeat_interleave(len(tokens) // len(value), dim=0)


@contextlib.contextmanager
def generation(model: nn.Module, given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Gives `given`, the arguments of `generate`, without those that belong to adapters; these hold while inside."""
    adapters: AdapterSet = model.__dict__[ATTRIBUTE]
    taken = {a for config in adapters.configs.values() for a in method_of(config).adapter.forward_arguments}
    before = adapters.generating
    adapters.generating = {key: value for key, value in given.items() if key in taken}
    try:
        yield {key: value for key, value in given.items() if key not in taken}
    finally:
        adapters.generating = before
