"""EVA: A starts as the principal components of the layer's input; layers with more variance get more rank.

arXiv:2410.07170. The components come from an incremental analysis (Ross et al. 2008). B starts at zero.
Shapes: n rows of x, i in_features, c components.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from peftcore.errors import ConfigError
from peftcore.methods.lora.initialisation import Factors, Initialisation, draw_defaults
from peftcore.methods.lora.observer import Observer
from peftcore.methods.lora.variant import register_variant

if TYPE_CHECKING:
    from peftcore.methods.lora.adapter import Lora
    from peftcore.methods.lora.config import LoraConfig

DEFAULTS: dict[str, Any] = {
    "rho": 2.0,
    "tau": 0.99,
    "use_label_mask": True,
    "label_mask_value": -100,
    "whiten": False,
    "adjust_scaling_factors": True,
}
"""`eva_config` under PEFT's names. A layer's rank is at most rho·r; tau is the cosine of a converged component."""


class PrincipalComponents:
    """Incremental principal components of all rows added so far; the rows are not stored."""

    def __init__(self, count: int):
        self.count, self.rows = count, 0
        self.mean = self.scatter = torch.zeros(())
        self.components: Tensor | None = None  # (c, i), orthonormal
        self.values = torch.zeros(0)  # (c,) singular values of the centred rows
        self.converged = torch.zeros(count, dtype=torch.bool)

    def add(self, x: Tensor, tau: float) -> None:
        """Update the components with rows x (n, i); tau is the cosine from which a component has converged."""
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
        """Return (c,): the share of the variance along each component."""
        return self.values.square() / self.scatter.clamp_min(torch.finfo(torch.float32).tiny)


class Eva(Observer):
    """Principal components of every layer's input."""

    title = "EVA"

    def __init__(self, config: "LoraConfig", layers: "Mapping[str, Lora]"):
        super().__init__(config, layers)
        self.options = {**DEFAULTS, **(config.eva_config or {})}
        if unknown := set(self.options) - set(DEFAULTS):
            raise ConfigError(f"eva_config: unknown {sorted(unknown)}; known: {', '.join(DEFAULTS)}")
        if self.options["rho"] < 1 or not 0 <= self.options["tau"] <= 1:
            raise ConfigError(f"eva_config: rho must be at least 1 and tau in [0, 1]; got {self.options}")
        self.keeps_alpha = not self.options["adjust_scaling_factors"]
        rho = self.options["rho"]
        self.components = {
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
            self.components[path].add(rows, self.options["tau"])

    def check(self) -> None:
        if all(components.components is None for components in self.components.values()):
            raise ConfigError(
                "EVA: the batches had no token, because attention_mask, or labels with use_label_mask=True, mask all "
                "of them; give other batches, or set use_label_mask=False"
            )

    def is_done(self) -> bool:
        ranks = self.ranks()
        return all(bool(components.converged[: ranks[path]].all()) for path, components in self.components.items())

    def ranks(self) -> dict[str, int]:
        budget = sum(adapter.r for adapter in self.layers.values())
        shares = [(float(s), path) for path, components in self.components.items() for s in components.explained()]
        best = sorted(shares, key=lambda share: -share[0])[:budget]
        return {path: sum(chosen == path for _, chosen in best) for path in self.layers}

    def factors(self, path: str, adapter: "Lora") -> Factors:
        return self.start(path, adapter.r), torch.zeros_like(adapter.lora_B_weight)

    def start(self, path: str, r: int) -> Tensor:
        """Return A (r, i) of one layer."""
        analysis = self.components[path]
        assert analysis.components is not None
        a = analysis.components[:r]
        if self.options["whiten"]:
            a = a / analysis.values[:r, None].clamp_min(torch.finfo(torch.float32).tiny)
        return a


class EvaStateDict(Eva):
    """Starts of layers that were computed before (`peftcore.get_eva_state_dict`), in place of data."""

    def __init__(self, config: "LoraConfig", layers: "Mapping[str, Lora]", starts: Mapping[str, Tensor]):
        super().__init__(config, layers)
        self.starts = starts
        """{path: A (r, i)}; a layer that is left out keeps its rank and the usual start."""

    def ranks(self) -> dict[str, int]:
        return {path: len(self.starts[path]) if path in self.starts else lora.r for path, lora in self.layers.items()}

    def factors(self, path: str, adapter: "Lora") -> Factors:
        a = self.starts[path].to(adapter.lora_A_weight) if path in self.starts else adapter.lora_A_weight.clone()
        return a, torch.zeros_like(adapter.lora_B_weight)


@register_variant
class EvaStart(Initialisation):
    """Initialisation `init_lora_weights="eva"`: A from principal components of the input, B zero; needs data."""

    names = ("eva",)
    observer = Eva
    required_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {"eva_config": DEFAULTS}

    def initialise(self, lora: "Lora") -> None:
        draw_defaults(lora)  # A keeps these values until the data are there
        nn.init.zeros_(lora.lora_B_weight)
