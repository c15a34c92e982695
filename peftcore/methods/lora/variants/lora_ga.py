"""LoRA-GA: A and B start so that LoRA's first step follows the gradient of the full weight. arXiv:2407.05000.

A and B take different singular directions of G, the mean gradient of W over the batches.
Shapes: i in_features, o out_features, r rank; G (o, i).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peftcore.errors import ConfigError
from peftcore.methods.lora.initialisation import Factors, Initialisation, draw_defaults
from peftcore.methods.lora.observer import Observer
from peftcore.methods.lora.variant import register_variant

if TYPE_CHECKING:
    from peftcore.methods.lora.adapter import Lora
    from peftcore.methods.lora.config import LoraConfig

DEFAULTS: dict[str, Any] = {"direction": "ArB2r", "scale": "stable", "stable_gamma": 16}
"""`lora_ga_config` under PEFT's names: the singular directions for A and B, and their scale."""
_DIRECTIONS = ("ArBr", "A2rBr", "ArB2r", "random")
_SCALES = ("stable", "weight_svd", "gd_scale", "unit")


def all_options(chosen: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return all options of `lora_ga_config`.

    Raises:
        ConfigError: For an unknown option, or a value that does not fit.
    """
    options = {**DEFAULTS, **(chosen or {})}
    if unknown := set(options) - set(DEFAULTS):
        raise ConfigError(f"lora_ga_config: unknown {sorted(unknown)}; known: {', '.join(DEFAULTS)}")
    for key, fits in (("direction", _DIRECTIONS), ("scale", _SCALES)):
        if options[key] not in fits:
            raise ConfigError(f"lora_ga_config: {key} must be one of {fits}; got {options[key]!r}")
    return options


def check_rank(lora: "Lora", place: str) -> None:
    """Raise ConfigError if the gradient has fewer than 2r singular vectors."""
    if 2 * lora.r > (most := min(lora.base.in_features, lora.base.out_features)):
        raise ConfigError(f"lora_ga needs 2r singular vectors: r at {place} must be at most {most // 2}; got {lora.r}")


def start_factors(gradient: Tensor, lora: "Lora", options: Mapping[str, Any]) -> Factors:
    """Return A and B of one layer.

    Args:
        gradient: G (o, i), the mean gradient of W, in float32.
        lora: The adapter of the layer.
        options: What `all_options` returned.
    """
    r = lora.r
    u, s, v = torch.svd_lowrank(gradient, q=min(4 * r, *gradient.shape), niter=4)
    of_a, of_b = _directions(options["direction"], r)
    a, b = v.T[of_a], u[:, of_b] * s[of_b]
    if options["scale"] == "stable":
        b = b * (lora.base.out_features**0.25 / options["stable_gamma"] ** 0.5)
    elif options["scale"] == "weight_svd":
        _, largest, _ = torch.svd_lowrank(lora.base.read_unmerged().float(), q=r, niter=4)
        b = b * (largest[0] / s[of_b][0] if s[of_b][0] > 0 else 1.0)
    elif options["scale"] == "gd_scale":
        a, b = a / lora.scaling, b / lora.scaling
    return a, b


def _directions(direction: str, r: int) -> tuple[Tensor, Tensor]:
    every = torch.arange(2 * r)
    if direction == "random":
        chosen = torch.randperm(2 * r)[:r]
        return chosen, chosen
    return {
        "ArBr": (every[1::2], every[0::2]),
        "A2rBr": (every[r:], every[:r]),
        "ArB2r": (every[:r], every[r:]),
    }[direction]


class LoraGa(Observer):
    """Gradients of every layer's weight."""

    title = "LoRA-GA"
    needs_loss = True

    def __init__(self, config: "LoraConfig", layers: "Mapping[str, Lora]"):
        super().__init__(config, layers)
        self.options = all_options(config.lora_ga_config)
        for path, adapter in layers.items():
            check_rank(adapter, path)
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
        return start_factors(self.gradient[path] / self.batches, adapter, self.options)


@register_variant
class LoraGaStart(Initialisation):
    """Initialisation `init_lora_weights="lora_ga"`: singular directions of the gradient, subtracted; needs data.

    The data come before get_peft_model (`preprocess_loraga`), or after it (`initialize_from_data`).
    """

    names = ("lora_ga",)
    observer = LoraGa
    subtracts = True
    prepared = "_peft_loraga_grad"

    def initialise(self, lora: "Lora") -> None:
        if (gradient := self.prepared_for(lora)) is None:
            super().initialise(lora)
            return
        check_rank(lora, "a layer")
        draw_defaults(lora)
        options = all_options(lora.config.lora_ga_config)
        lora.set_factors(*start_factors(lora.base.oriented(gradient).float(), lora, options))
        lora.subtract_start()
