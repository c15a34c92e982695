"""CorDA (arXiv:2406.05223): the initial factors come from the SVD of W·C, with C the covariance of the layer's input.

"ipm" (instruction-previewed) trains the r directions that are most important for the data. "kpm"
(knowledge-preserved) trains the r least important ones, so that the model keeps its knowledge.

Shapes: i in_features; C (i, i).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftcore.errors import ConfigError
from peftcore.init.observer import Observer
from peftcore.methods.lora import Lora, LoraConfig

_STORAGE = {"cache_file", "covariance_file", "verbose", "use_float16_for_covariance", "prune_temporary_fields"}
"""HF PEFT's options for intermediate files; accepted, and without effect on the result."""


class Corda(Observer):
    """`init_lora_weights="corda"`."""

    title = "CorDA"
    subtracts_residual = True

    def __init__(self, config: LoraConfig, layers: Mapping[str, Lora]):
        super().__init__(config, layers)
        options: dict[str, Any] = {"corda_method": "ipm", **(config.corda_config or {})}
        if unknown := set(options) - {"corda_method"} - _STORAGE:
            raise ConfigError(f"corda_config: unknown {sorted(unknown)}; known: corda_method")
        self.method = options["corda_method"]
        if self.method not in ("ipm", "kpm"):
            raise ConfigError(f"corda_config: corda_method must be 'ipm' or 'kpm'; got {self.method!r}")
        self.covariance: dict[str, Tensor] = {}
        self.samples: dict[str, int] = {}

    def observe(self, path: str, x: Tensor, y: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        rows = rows / rows.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        self.covariance[path] = self.covariance.get(path, torch.zeros(())) + rows.T @ rows
        self.samples[path] = self.samples.get(path, 0) + 1

    def factors(self, path: str, adapter: Lora) -> tuple[Tensor, Tensor]:
        weight = adapter.base.read_unmerged().float()
        covariance, inverse = _invertible(self.covariance[path] / self.samples[path])
        u, s, vh = torch.linalg.svd(weight @ covariance, full_matrices=False)
        r = adapter.r
        chosen = slice(None, r) if self.method == "ipm" else slice(len(s) - r, None)
        root = (s[chosen] / adapter.scaling).sqrt()
        return root[:, None] * (vh[chosen] @ inverse), u[:, chosen] * root


def _invertible(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return the covariance, with enough added to its diagonal to be invertible, and its inverse."""
    identity = torch.eye(len(covariance), device=covariance.device)
    damp, mean = 0.01, covariance.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    while True:
        damped = covariance + damp * mean * identity
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, identity) < 0.05:
            return damped, inverse
        damp *= 2
