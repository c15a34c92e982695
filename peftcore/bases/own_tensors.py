"""The tensors that a module computes with as its parameters.

Usually they are its parameters. While FSDP (version 1, use_orig_params=True) runs a forward, views of its flat
parameter stand there as attributes; while a backward computes that forward again, only as attributes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def own_tensor(module: nn.Module, name: str) -> Tensor | None:
    """What stands for the parameter `name` of a module; None if there is none."""
    parameter = module._parameters.get(name)  # several times faster than an attribute
    return module.__dict__.get(name) if parameter is None else parameter


def call_with(
    module: nn.Module, tensors: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> Any:
    """The module's output with other tensors in the place of parameters; tensors: by path from the module."""
    parameters = dict(tensors)
    shadows: list[tuple[dict[str, Any], str, Tensor]] = []
    for path in tensors:
        owner, _, name = path.rpartition(".")
        attributes = module.get_submodule(owner).__dict__
        if name in attributes:
            shadows.append((attributes, name, attributes[name]))
            attributes[name] = parameters.pop(path)
    try:
        # ties stay out of it: another name of the same tensor may be adapted by a site of its own
        return torch.func.functional_call(module, parameters, args, dict(kwargs or {}), tie_weights=False)
    finally:
        for attributes, name, own in shadows:
            attributes[name] = own
