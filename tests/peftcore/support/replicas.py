"""Replicas as nn.DataParallel makes them, on the CPU."""

import importlib
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn


def replicas(module: nn.Module, count: int = 1) -> list[Any]:
    """Return replicas of a module with copies of its tensors, through which gradients flow."""
    replicate: Any = importlib.import_module("torch.nn.parallel.replicate")

    def copied(tensors: Sequence[Tensor], devices: Sequence[int], detach: bool = False) -> list[list[Tensor]]:
        return [[tensor.detach().clone() if detach else tensor.clone() for tensor in tensors] for _ in devices]

    with (
        mock.patch.object(replicate, "_broadcast_coalesced_reshape", copied),
        mock.patch.object(replicate, "_get_device_index", lambda device, optional: device),
        torch.enable_grad(),
    ):
        return replicate.replicate(module, list(range(count)))
