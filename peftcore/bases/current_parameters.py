"""Call a module with other tensors in place of its parameters.

Usually a module's tensors are its registered parameters. FSDP version 1 (`use_orig_params=True`) replaces them during a
forward pass by views of its flat parameter, which are plain attributes of the module. When a backward pass recomputes
that forward pass, only the attributes exist.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.bases.offload import offload_hook, offloaded_tensor


def call_with_parameters(
    module: nn.Module, tensors: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> Any:
    """Call the module with other tensors in place of some parameters.

    Args:
        module: The module to call.
        tensors: Replacement tensors by parameter path, relative to the module.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.

    Returns:
        The module's output.
    """
    parameters, hooked = dict(tensors), module.__dict__.get("forward")
    if (hook := offload_hook(module)) is not None:
        # accelerate's forward would put the offloaded parameters into the places of the given ones
        missing = (name for name, own in module._parameters.items() if own is not None and own.is_meta)
        parameters = {**{name: offloaded_tensor(hook, name) for name in missing}, **parameters}
        module.__dict__["forward"] = module._old_forward
    attributes_before: list[tuple[dict[str, Any], str, Tensor]] = []
    for path in tensors:
        owner, _, name = path.rpartition(".")
        attributes = module.get_submodule(owner).__dict__
        if name in attributes:
            attributes_before.append((attributes, name, attributes[name]))
            attributes[name] = parameters.pop(path)
    try:
        # tie_weights=False: another name of a tied tensor may have an adapter slot of its own
        return torch.func.functional_call(module, parameters, args, dict(kwargs or {}), tie_weights=False)
    finally:
        if hook is not None:
            module.__dict__["forward"] = hooked
        for attributes, name, tensor in attributes_before:
            attributes[name] = tensor
