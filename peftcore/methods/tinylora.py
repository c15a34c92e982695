"""TinyLoRA: ΔW = B (Σ_k v_k P_k) A, with A, B from the SVD of W, fixed random P_k and a tiny v. arXiv:2602.04118.

A = √S Vᵀ and B = U √S hold the r largest singular values of W = U S Vᵀ. Only v trains, and `weight_tying` lets layers
share it. Layer number n of an adapter draws its P from the seed `projection_seed` + n.

Shapes: i in_features, o out_features, r rank, u length of v; A (r, i), B (o, r), P (u, r, r). On an embedding of v rows
of size d, as PEFT stores it: A (r, d), B (v, r), ΔW = (B R A)ᵀ.
Unlike in PEFT, the embedding's own scale applies to ΔW, too, and init_weights=False fills v; PEFT leaves it unset.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from peftcore.adapter import Adapter, Shared
from peftcore.bases import BaseWeight
from peftcore.config import TunerConfig
from peftcore.errors import ConfigError
from peftcore.kernels.factors import Factors
from peftcore.registry import register


@dataclass
class TinyLoraConfig(TunerConfig):
    """TinyLoRA's options under PEFT's names."""

    not_saved_if_none: ClassVar[tuple[str, ...]] = ("exclude_modules",)

    r: int = 2
    """Singular values of each weight that take part (count); a smaller weight gives fewer."""
    u: int = 64
    """Length of a trained vector (count)."""
    weight_tying: float = 0.0
    """0: each layer trains its own vector; 1: all layers share one; between, groups of successive layers share."""
    projection_seed: int = 42
    """Seed of the first layer's projections P."""
    save_projection: bool = True
    """False omits P from the directory; loading then draws P again from the seed."""
    init_v_bound: float = 0.02
    """Bound of the random start values of v."""
    tinylora_dropout: float = 0.0
    """Probability of dropping an element of the adapter's input in training; on an embedding, of its r values."""
    fan_in_fan_out: bool = False
    """Read and saved for PEFT; without effect, because the orientation is found per layer."""
    bias: str = "none"
    """Biases of the model that train too: "none", "all" or "tinylora_only"."""
    init_weights: bool | str = True
    """True: v starts at zero; "uniform": random; False: random from `projection_seed`, for tests."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r", "u")
        self.probability("tinylora_dropout")
        self.one_of("bias", self.bias, ("none", "all", "tinylora_only"))
        self._warn_of_unsaved("projection tensors P", "projection_seed")
        if not 0 <= self.weight_tying <= 1:
            raise ConfigError(f"TinyLoraConfig: weight_tying must be from 0 to 1; got {self.weight_tying!r}")
        if self.init_weights not in (True, False, "uniform"):
            raise ConfigError(
                f"TinyLoraConfig: init_weights must be True, False or 'uniform'; got {self.init_weights!r}"
            )


class Vectors(Shared):
    """The trained vectors, one for each group of successive layers."""

    def __init__(self, config: TinyLoraConfig, bases: Mapping[str, BaseWeight]):
        super().__init__()
        groups = max(1, round(len(bases) * (1 - config.weight_tying)))
        self.group_size = max(1, len(bases) // groups)
        self.numbers = {path: number for number, path in enumerate(bases)}
        self.keys = {path: str(min(n // self.group_size, groups - 1)) for path, n in self.numbers.items()}
        self.tinylora_v = nn.ParameterDict({str(g): nn.Parameter(torch.empty(config.u)) for g in range(groups)})

    def is_first(self, path: str) -> bool:
        """Return True for the first layer of a group, which initialises the group's vector."""
        return self.numbers[path] == int(self.keys[path]) * self.group_size


@register("TINYLORA", TinyLoraConfig)
class TinyLora(Adapter):
    """TinyLoRA at one layer."""

    layer_kinds = frozenset({"linear", "embedding"})
    dropout_option = "tinylora_dropout"

    shared: Vectors
    tinylora_A: Tensor
    tinylora_B: Tensor
    tinylora_P: Tensor

    def __init__(self, config: TinyLoraConfig, base: BaseWeight, path: str):
        super().__init__(config, base, path)
        self.config, self.path = config, path
        self.add_dropout()
        r = min(config.r, base.in_features, base.out_features)
        rows, columns = base.out_features, base.in_features
        if base.kind == "embedding":
            rows, columns = columns, rows
        self.register_buffer("tinylora_A", torch.empty(r, columns))
        self.register_buffer("tinylora_B", torch.empty(rows, r))
        self.register_buffer("tinylora_P", torch.empty(config.u, r, r), persistent=config.save_projection)

    @classmethod
    def make_shared(cls, config: TinyLoraConfig, bases: Mapping[str, BaseWeight]) -> Vectors:
        return Vectors(config, bases)

    @property
    def vector(self) -> nn.Parameter:
        """The vector v (u,) of this layer."""
        return self.shared.tinylora_v[self.shared.keys[self.path]]

    @torch.no_grad()
    def make_constants(self) -> None:
        generator = torch.Generator("cpu").manual_seed(self.config.projection_seed + self.shared.numbers[self.path])
        r = self.tinylora_P.shape[1]
        drawn = torch.normal(0.0, 1 / math.sqrt(r), self.tinylora_P.shape, generator=generator, device="cpu")
        self.tinylora_P = drawn.to(self.base.dtype).to(self.tinylora_P)

    def prepare_to_read(self) -> None:
        """Draw P, which a saved adapter may lack."""
        self.make_constants()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.shared.is_first(self.path):
            self._start_vector()
        weight = self.base.read_unmerged()
        weight = weight.T if self.base.kind == "embedding" else weight
        u, s, vh = torch.linalg.svd(weight.float(), full_matrices=False)  # PEFT's type, also for float64
        r, roots = len(self.tinylora_A), s[: len(self.tinylora_A)].to(weight.dtype).sqrt()
        self.tinylora_A.copy_(roots[:, None] * vh[:r].to(weight.dtype))
        self.tinylora_B.copy_(u[:, :r].to(weight.dtype) * roots)
        self.make_constants()

    def _start_vector(self) -> None:
        bound, start = self.config.init_v_bound, torch.zeros(self.config.u, dtype=self.base.dtype, device="cpu")
        if self.config.init_weights is False:
            start.uniform_(-bound, bound, generator=torch.Generator("cpu").manual_seed(self.config.projection_seed))
        elif self.config.init_weights == "uniform":
            start.uniform_(-bound, bound)  # in the base's type, as PEFT draws it
        self.vector.copy_(start)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Return two factors (r, i) and (o, r), whose product is ΔW."""
        vector, p = self.vector.to(self.tinylora_P.device), self.tinylora_P
        mixed = (vector.to(p.dtype) @ p.flatten(1)).view(p.shape[1:])
        if self.base.kind == "embedding":
            return self.tinylora_B.T, (mixed @ self.tinylora_A).T
        return self.tinylora_A, self.tinylora_B @ mixed

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        down, up = self._factors()
        if self.base.kind == "embedding":
            return self.base.add_pointwise(y, self.dropped(self.base.apply(x, down)).to(y.dtype), up)
        return self.base.add_pointwise(y, self.base.apply(self.dropped(x), down).to(y.dtype), up)

    def exact_factors(self) -> Factors:
        down, up = self._factors()
        return Factors(down[None], up[None])

    # -- disk: A and B as well, so that another base of the same shape gives no other adapter ------------------------

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        names = ("tinylora_A", "tinylora_B", *(["tinylora_P"] if self.config.save_projection else []))
        return {name: self.get_buffer(name) for name in names}

    def repeated_keys(self) -> set[str]:
        return super().repeated_keys() | (set() if self.config.save_projection else {"tinylora_P"})

    @torch.no_grad()
    def load_checkpoint_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.get_buffer(name).copy_(tensor)

    @classmethod
    def config_to_save(cls, config: TinyLoraConfig, adapters: Mapping[str, Adapter]) -> TinyLoraConfig:
        """Return the configuration with all paths named if it excludes layers, which PEFT's TinyLoRA cannot."""
        return config if config.exclude_modules is None else config.naming_targets(adapters)
