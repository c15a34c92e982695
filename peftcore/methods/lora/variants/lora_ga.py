"""LoRA-GA: A and B start so that LoRA's first step follows the gradient of the full weight. arXiv:2407.05000.

A and B take different singular directions of G, the mean gradient of W over the batches.
Shapes: i in_features, o out_features, r rank; G (o, i).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peftcore.errors import ConfigError
from peftcore.methods.lora.initialisation import Factors, Initialisation
from peftcore.methods.lora.observer import Observer
from peftcore.methods.lora.variant import register_variant

if TYPE_CHECKING:
    from peftcore.methods.lora.adapter import Lora
    from peftcore.methods.lora.config import LoraConfig

DEFAULTS: dict[str, Any] = {"direction": "ArB2r", "scale": "stable", "stable_gamma": 16}
"""`lora_ga_config` under PEFT's names: the singular directions for A and B, and their scale."""
_DIRECTIONS = ("ArBr", "A2rBr", "ArB2r", "random")
_SCALES = ("stable", "weight_svd", "gd_scale", "unit")


class LoraGa(Observer):
    """Gradients of every layer's weight."""

    title = "LoRA-GA"
    needs_loss = True

    def __init__(self, config: "LoraConfig", layers: "Mapping[str, Lora]"):
        super().__init__(config, layers)
        self.options = {**DEFAULTS, **(config.lora_ga_config or {})}
        if unknown := set(self.options) - set(DEFAULTS):
            raise ConfigError(f"lora_ga_config: unknown {sorted(unknown)}; known: {', '.join(DEFAULTS)}")
        for key, fits in (("direction", _DIRECTIONS), ("scale", _SCALES)):
            if self.options[key] not in fits:
                raise ConfigError(f"lora_ga_config: {key} must be one of {fits}; got {self.options[key]!r}")
        for path, adapter in layers.items():
            if 2 * adapter.r > (most := min(adapter.base.in_features, adapter.base.out_features)):
                raise ConfigError(f"lora_ga needs 2r singular vectors: r at {path} must be at most {most // 2}")
        self.gradient: dict[str, Tensor] = {}
        """{path: sum of the gradients of W over the batches}"""
        self.batches = 0

    def begin(self, batch: Mapping[str, Any]) -> None:
        self.batches += 1

    def observe(self, path: str, x: Tensor, y: Tensor) -> Tensor:
        if not y.requires_grad:
            y = y.detach().requires_grad_()
        rows = x.detach().reshape(-1, x.shape[-1]).float()

        def add(gradient: Tensor) -> None:
            of_weight = gradient.reshape(-1, gradient.shape[-1]).float().T @ rows
            self.gradient[path] = self.gradient.get(path, torch.zeros(())) + of_weight

        y.register_hook(add)
        return y

    def factors(self, path: str, adapter: "Lora") -> Factors:
        gradient, r = self.gradient[path] / self.batches, adapter.r
        u, s, v = torch.svd_lowrank(gradient, q=min(4 * r, *gradient.shape), niter=4)
        of_a, of_b = self._directions(r)
        a, b = v.T[of_a], u[:, of_b] * s[of_b]
        scale = self.options["scale"]
        if scale == "stable":
            b = b * (adapter.base.out_features**0.25 / self.options["stable_gamma"] ** 0.5)
        elif scale == "weight_svd":
            _, largest, _ = torch.svd_lowrank(adapter.base.read_unmerged().float(), q=r, niter=4)
            b = b * (largest[0] / s[of_b][0] if s[of_b][0] > 0 else 1.0)
        elif scale == "gd_scale":
            a, b = a / adapter.scaling, b / adapter.scaling
        return a, b

    def _directions(self, r: int) -> tuple[Tensor, Tensor]:
        every = torch.arange(2 * r)
        if self.options["direction"] == "random":
            chosen = torch.randperm(2 * r)[:r]
            return chosen, chosen
        return {
            "ArBr": (every[1::2], every[0::2]),
            "A2rBr": (every[r:], every[:r]),
            "ArB2r": (every[:r], every[r:]),
        }[self.options["direction"]]


@register_variant
class LoraGaStart(Initialisation):
    """Initialisation `init_lora_weights="lora_ga"`: singular directions of the gradient, subtracted; needs data."""

    names = ("lora_ga",)
    observer = LoraGa
    subtracts = True
