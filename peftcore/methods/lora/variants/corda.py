"""CorDA: A and B start from SVD(W·C), with C the covariance of the layer's input. arXiv:2406.05223.

"ipm" trains the r directions that matter most to the data; "kpm" trains the r that matter least, to preserve knowledge.
Shapes: i in_features, o out_features, r rank; C (i, i), W (o, i).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftcore.errors import ConfigError
from peftcore.methods.lora.initialisation import Factors, Initialisation, draw_defaults
from peftcore.methods.lora.observer import Observer
from peftcore.methods.lora.variant import register_variant

if TYPE_CHECKING:
    from peftcore.methods.lora.adapter import Lora
    from peftcore.methods.lora.config import LoraConfig

_STORAGE = {"cache_file", "covariance_file", "verbose", "use_float16_for_covariance", "prune_temporary_fields"}
"""Options for the files of PEFT's intermediate results; no effect here."""


class Corda(Observer):
    """Input covariances of every layer."""

    title = "CorDA"

    def __init__(self, config: "LoraConfig", layers: "Mapping[str, Lora]"):
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

    def factors(self, path: str, adapter: "Lora") -> Factors:
        weight = adapter.base.read_unmerged().float()
        covariance, inverse = _invertible(self.covariance[path] / self.samples[path])
        u, s, vh = torch.linalg.svd(weight @ covariance, full_matrices=False)
        r = adapter.r
        chosen = slice(None, r) if self.method == "ipm" else slice(len(s) - r, None)
        root = (s[chosen] / adapter.scaling).sqrt()
        return root[:, None] * (vh[chosen] @ inverse), u[:, chosen] * root


def _invertible(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return the covariance, with its diagonal raised until it is well conditioned, and the inverse."""
    identity = torch.eye(len(covariance), device=covariance.device)
    damp, mean = 0.01, covariance.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    while True:
        damped = covariance + damp * mean * identity
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, identity) < 0.05:
            return damped, inverse
        damp *= 2


@register_variant
class CordaStart(Initialisation):
    """Initialisation `init_lora_weights="corda"`: factors of SVD(W·C), subtracted from the base; needs data."""

    names = ("corda",)
    observer = Corda
    subtracts = True

    def initialise(self, lora: "Lora") -> None:
        draw_defaults(lora)  # A keeps these values until the data are there
        nn.init.zeros_(lora.lora_B)
