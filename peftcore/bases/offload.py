"""Layers whose weights accelerate has offloaded (`dispatch_model`, `cpu_offload`, `disk_offload`).

Such a layer's parameters are on the meta device. accelerate's hook moves the weights to the execution device before
each forward pass of the layer, and removes them after it. Between forward passes the weights are in the hook's
`weights_map`, in memory or on disk.
"""

from typing import Any

import torch
from torch import Tensor, nn


def offload_hook(layer: nn.Module) -> Any:
    """Return accelerate's hook that offloads the layer's own parameters; None if there is none."""
    hook = layer.__dict__.get("_hf_hook")
    return None if hook is None else offloading(hook)


def offloading(hook: Any) -> Any:
    """Return the part of a hook of accelerate that offloads; None if no part does."""
    return next((one for one in getattr(hook, "hooks", (hook,)) if getattr(one, "offload", False)), None)


def execution_device(hook: Any) -> torch.device:
    """Return the device on which an offloaded layer computes."""
    return torch.device(hook.execution_device)


def offloaded_tensor(hook: Any, name: str) -> Tensor:
    """Return the values of an offloaded parameter on the execution device."""
    return hook.weights_map[name].to(execution_device(hook))


def replace_offloaded(layer: nn.Module, hook: Any, name: str, values: Tensor) -> None:
    """Give an offloaded parameter new values, which stay in the CPU's memory."""
    weights = {key: hook.weights_map[key] for key in layer._parameters if layer._parameters[key] is not None}
    hook.weights_map = {**weights, name: values.detach().contiguous().cpu()}
