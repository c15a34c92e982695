"""EVA (arXiv:2410.07170): A holds the principal components of a layer's input.

Layers whose components explain more variance get a higher rank. B is zero. The components come from an incremental
principal component analysis (Ross et al. 2008, doi:10.1007/s11263-007-0075-7).

Shapes: n rows of x, i in_features, c components.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftcore.errors import ConfigError
from peftcore.init.observer import Observer
from peftcore.methods.lora import Lora, LoraConfig

DEFAULTS: dict[str, Any] = {
    "rho": 2.0,
    "tau": 0.99,
    "use_label_mask": True,
    "label_mask_value": -100,
    "whiten": False,
    "adjust_scaling_factors": True,
}
"""Defaults of `eva_config`, by PEFT's names.

A layer's rank is at most rho·r. A component has converged if its cosine to the component before the batch reaches tau.
"""


class PrincipalComponents:
    """Principal components of a stream of rows; the rows themselves are not stored."""

    def __init__(self, count: int):
        self.count, self.rows = count, 0
        self.mean = self.scatter = torch.zeros(())
        self.components: Tensor | None = None  # (c, i), orthonormal
        self.values = torch.zeros(0)  # (c,) singular values of the centred rows
        self.converged = torch.zeros(count, dtype=torch.bool)

    def add(self, x: Tensor, tau: float) -> None:
        """Update the components by rows x (n, i); a component whose cosine to its update reaches tau has converged."""
        x = x.float()
        n, mean = len(x), x.mean(0)
        total = self.rows + n
        centred = x - mean
        shift = (self.rows * n / total) ** 0.5 * (self.mean - mean)
        self.scatter = self.scatter + centred.square().sum() + shift.square().sum()
        parts = [centred, shift.expand(1, -1)]
        if self.components is not None:
            parts.append(self.values[:, None] * self.components)
        _, values, directions = torch.linalg.svd(torch.cat(parts), full_matrices=False)
        self.values, directions = values[: self.count], directions[: self.count]
        if self.components is not None and self.components.shape == directions.shape:
            self.converged = (self.components * directions).sum(1).abs() >= tau
        self.components = directions
        self.mean = (self.rows * self.mean + n * mean) / total
        self.rows = total

    def explained(self) -> Tensor:
        """Return the share of the variance that each component explains, (c,)."""
        return self.values.square() / self.scatter.clamp_min(torch.finfo(torch.float32).tiny)


class Eva(Observer):
    """`init_lora_weights="eva"`."""

    title = "EVA"

    def __init__(self, config: LoraConfig, layers: Mapping[str, Lora]):
        super().__init__(config, layers)
        self.options = {**DEFAULTS, **(config.eva_config or {})}
        if unknown := set(self.options) - set(DEFAULTS):
            raise ConfigError(f"eva_config: unknown {sorted(unknown)}; known: {', '.join(DEFAULTS)}")
        if self.options["rho"] < 1 or not 0 <= self.options["tau"] <= 1:
            raise ConfigError(f"eva_config: rho must be at least 1 and tau in [0, 1]; got {self.options}")
        self.adjusts_scaling = not self.options["adjust_scaling_factors"]
        rho = self.options["rho"]
        self.analyses = {
            path: PrincipalComponents(min(round(a.r * rho), a.base.in_features, a.base.out_features))
            for path, a in layers.items()
        }
        self.mask: Tensor | None = None

    def begin(self, batch: Mapping[str, Any]) -> None:
        mask = batch.get("attention_mask")
        labels = batch.get("labels")
        self.mask = None if mask is None else mask.bool()
        if self.options["use_label_mask"] and labels is not None and "input_ids" in batch:
            counted = labels != self.options["label_mask_value"]
            self.mask = counted if self.mask is None else self.mask & counted

    def observe(self, path: str, x: Tensor, y: Tensor) -> None:
        fits = self.mask is not None and self.mask.shape == x.shape[:-1]
        rows = x[self.mask] if fits else x.reshape(-1, x.shape[-1])
        if len(rows):
            self.analyses[path].add(rows, self.options["tau"])

    def is_done(self) -> bool:
        ranks = self.ranks()
        return all(bool(own.converged[: ranks[path]].all()) for path, own in self.analyses.items())

    def ranks(self) -> dict[str, int]:
        budget = sum(adapter.r for adapter in self.layers.values())
        shares = [(float(s), path) for path, own in self.analyses.items() for s in own.explained()]
        best = sorted(shares, key=lambda share: -share[0])[:budget]
        return {path: sum(chosen == path for _, chosen in best) for path in self.layers}

    def factors(self, path: str, adapter: Lora) -> tuple[Tensor, Tensor]:
        own = self.analyses[path]
        assert own.components is not None
        a = own.components[: adapter.r]
        if self.options["whiten"]:
            a = a / own.values[: adapter.r, None].clamp_min(torch.finfo(torch.float32).tiny)
        return a, torch.zeros_like(adapter.lora_B)
