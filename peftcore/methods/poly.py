"""Poly: y = Wx + b + (1/r) x A B with A, B mixed by task from n_skills LoRAs, Σ_s w_ts A_s. arXiv:2202.13914.

Multi-head routing (n_splits > 1) mixes each slice of the inputs and outputs on its own, arXiv:2211.03831.
The mixture weights of task t are w_t = z/Σz with z = σ(logits of t). In training, z is a relaxed Bernoulli sample.
Shapes: t tasks, q splits, s skills, i in_features, o out_features, r rank, n rows of a batch (1 without task_ids);
logits (t, q·s), A (q, s, i/q, r), B (q, s, r, o/q).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import RelaxedBernoulli

from peftcore._util.per_thread import PerThread
from peftcore.adapter import Adapter, Shared
from peftcore.bases import BaseWeight
from peftcore.config import TunerConfig
from peftcore.errors import ConfigError, MergeError
from peftcore.kernels.start_values import kaiming_uniform_, uniform_
from peftcore.registry import register


@dataclass
class PolyConfig(TunerConfig):
    """Poly's options under PEFT's names."""

    not_saved_if_none: ClassVar[tuple[str, ...]] = ("layers_pattern", "layers_to_transform")

    r: int = 8
    """Rank of each skill (count)."""
    n_tasks: int = 1
    """Tasks (count); with several, the model's call needs task_ids."""
    n_skills: int = 4
    """LoRAs that all tasks share (count)."""
    n_splits: int = 1
    """Slices of the inputs and outputs that are mixed separately (count); must divide in_features and out_features."""
    poly_type: str = "poly"
    """Only "poly"."""
    init_weights: bool = True
    """True: the adapter starts at zero; False: random, for tests."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r", "n_tasks", "n_skills", "n_splits")
        self.one_of("poly_type", self.poly_type, ("poly",))


class Tasks(Shared):
    """Task of each row of the current batch, (n); None if there is only one task."""

    ids = PerThread()


class Router(nn.Module):
    """Mixture weights of the tasks over the skills."""

    def __init__(self, config: PolyConfig):
        super().__init__()
        self.module_logits = nn.Parameter(torch.empty(config.n_tasks, config.n_splits * config.n_skills))

    def forward(self, tasks: Tensor | None, splits: int) -> Tensor:
        """Return the mixture weights (n, q, s); (1, q, s) without tasks."""
        logits = self.module_logits[:1] if tasks is None else self.module_logits[tasks.to(self.module_logits.device)]
        logits = logits.view(len(logits), splits, -1)
        z = RelaxedBernoulli(logits.new_ones(()), logits=logits).rsample() if self.training else logits.sigmoid()
        return z / (z.sum(-1, keepdim=True) + 1e-12)


@register("POLY", PolyConfig)
class Poly(Adapter):
    """Poly at one layer."""

    shared: Tasks

    def __init__(self, config: PolyConfig, base: BaseWeight, path: str):
        super().__init__(config, base, path)
        i, o, q, s, r = base.in_features, base.out_features, config.n_splits, config.n_skills, config.r
        if i % q or o % q:
            raise ConfigError(f"POLY: n_splits must divide {i} and {o} at {path}, got {q}; try {math.gcd(i, o, q)}")
        self.path, self.init = path, config.init_weights
        self.poly_lora_A = nn.Parameter(torch.empty(q, s, i // q, r))
        self.poly_lora_B = nn.Parameter(torch.empty(q, s, r, o // q))
        self.poly_router = Router(config)

    @classmethod
    def make_shared(cls, config: PolyConfig, bases: Mapping[str, BaseWeight]) -> Tasks:
        return Tasks()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        _draw_skills(self.poly_lora_A)
        nn.init.zeros_(self.poly_lora_B) if self.init else _draw_skills(self.poly_lora_B)
        uniform_(self.poly_router.module_logits, 1e-3)

    @classmethod
    def forward_arguments(cls, config: PolyConfig) -> frozenset[str]:
        return frozenset({"task_ids"})

    @classmethod
    def before_forward(
        cls, config: PolyConfig, adapters: Mapping[str, Adapter], model: nn.Module, inputs: dict[str, Any]
    ) -> None:
        ids = inputs.get("task_ids")
        ids = None if ids is None else torch.as_tensor(ids)
        if ids is None and config.n_tasks > 1:
            raise ConfigError(f"POLY: give task_ids, the task (0 to {config.n_tasks - 1}) of each row of the batch")
        if ids is not None and not 0 <= int(ids.min()) <= int(ids.max()) < config.n_tasks:
            raise ConfigError(f"POLY: task_ids must be from 0 to {config.n_tasks - 1}, got {ids.tolist()}")
        next(iter(adapters.values())).shared.ids = ids

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        mixture = self.poly_router(self.shared.ids, len(self.poly_lora_A))
        n, rank = len(mixture), self.poly_lora_A.shape[-1]
        a = torch.einsum("nqs,qsir->nqir", mixture, self.poly_lora_A).flatten(1, 2)  # (n, i, r)
        b = torch.einsum("nqs,qsro->nrqo", mixture, self.poly_lora_B).flatten(2)  # (n, r, o)
        if x.shape[:-1].numel() % n:
            raise ConfigError(f"POLY: {n} task_ids do not fit the {x.shape[:-1].numel()} tokens at {self.path}")
        h = x.reshape(n, -1, x.shape[-1]) @ a.to(x.dtype)
        return y + ((h / rank) @ b.to(h.dtype)).reshape(y.shape).to(y.dtype)

    def check_mergeable(self) -> None:
        raise MergeError("POLY's weights depend on the task, so no fixed weight equals the adapter; keep it unmerged")


def _draw_skills(factors: Tensor) -> None:
    """Draw the factors (splits, skills, i, o) of each skill and split by themselves, as (o, i)."""
    for of_skill in factors.transpose(0, 1):
        for factor in of_skill:
            factor.copy_(kaiming_uniform_(torch.empty(factor.T.shape, device="cpu")).T)
