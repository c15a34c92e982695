"""AdaLoRA: W = W₀ + s·P Λ Q, with the rank budget moved to where triplets matter. arXiv:2303.10512.

Each of the r triplets (column of P, λ, row of Q) is scored S = s(λ) + mean s(P·j) + mean s(Q j·), where
s(w) = Ī·Ū, Ī ← β₁Ī + (1−β₁)|w·∇w| and Ū ← β₂Ū + (1−β₂)|I − Ī|. Every deltaT steps the best b(t) triplets of the
whole model keep their λ, and the λ of the others is set to zero; these still get gradients and may return. The budget
is b₀ for t ≤ tinit, b_T in the last tfinal steps, and b_T + (b₀ − b_T)(1 − (t − tinit)/(T − tinit − tfinal))³ between.

Shapes: i in_features (of a convolution: input channels times the kernel's size), o out_features, r rank; Q =
lora_A_weight (r, i), Λ = lora_E_weight (r, 1), P = lora_B_weight (o, r).
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from peftcore._util.state_pruning import can_prune, pruned
from peftcore.adapter import Adapter, FactorNames
from peftcore.bases import BaseWeight
from peftcore.config import TunerConfig
from peftcore.errors import ConfigError, TrainingError
from peftcore.kernels.factors import Factors
from peftcore.kernels.low_rank import LowRankBranch
from peftcore.kernels.start_values import normal_
from peftcore.registry import register

_KEYS = {"lora_A_weight": "lora_A", "lora_B_weight": "lora_B", "lora_E_weight": "lora_E"}
"""{parameter: its name in PEFT's format}"""


@dataclass
class AdaLoraConfig(TunerConfig):
    """AdaLoRA's options under PEFT's names; steps count optimiser steps."""

    derives_from: ClassVar[str] = "LORA"
    ignored_on_disk: ClassVar[dict[str, Any]] = {
        "alora_invocation_tokens": None,
        "alpha_pattern": {},
        "arrow_config": None,
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "kasa_config": None,
        "layer_replication": None,
        "loftq_config": {},
        "lora_bias": False,
        "lora_ga_config": None,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "monteclora_config": None,
        "qalora_group_size": 16,
        "target_parameters": None,
        "trainable_token_indices": None,
        "use_bdlora": None,
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": False,
        "velora_config": None,
    }
    not_shown: ClassVar[frozenset[str]] = TunerConfig.not_shown | {"r"}
    size_fields: ClassVar[tuple[str, ...]] = ("init_r",)
    has_schedule: ClassVar[bool] = True

    r: int = 8
    """Read and saved for PEFT; without effect: `init_r` and `target_r` are the ranks."""
    target_r: int = 8
    """Average rank per layer at the end."""
    init_r: int = 12
    """Rank of every layer at the start."""
    tinit: int = 0
    """Steps before the budget begins to fall."""
    tfinal: int = 0
    """Last steps, with the final budget."""
    deltaT: int = 1
    """Steps between two allocations."""
    beta1: float = 0.85
    """Decay of the running mean of a triplet's importance."""
    beta2: float = 0.85
    """Decay of the running mean of its deviation from that mean."""
    orth_reg_weight: float = 0.5
    """Weight of the regulariser that keeps P and Q orthogonal."""
    total_step: int | None = None
    """Optimiser steps of the whole training; required for training, not for loading."""
    rank_pattern: dict[str, list[bool]] | None = None
    """{path.lora_E: mask of the init_r triplets}; written on saving, with tensors of the kept triplets only."""
    lora_alpha: float = 8
    """α of the scaling."""
    lora_dropout: float = 0.0
    """Probability of dropping an element of the adapter's input in training."""
    bias: str = "none"
    """Biases of the model that train too: "none", "all" or "lora_only"."""
    init_lora_weights: bool | str = True
    """True: the adapter starts at zero; False: random, for tests."""
    fan_in_fan_out: bool = False
    """Read and saved for PEFT; without effect, because the orientation is found per layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("target_r", "init_r", "deltaT")
        if self.r != 8:
            warnings.warn(
                f"AdaLoraConfig: r={self.r} has no effect; set init_r, the rank at the start, and target_r, the "
                "average rank at the end",
                stacklevel=4,
            )
        if isinstance(self.init_lora_weights, str):  # HF PEFT takes it, too, and starts as with True
            warnings.warn(
                f"AdaLoraConfig: init_lora_weights={self.init_lora_weights!r} has no effect, because AdaLoRA always "
                "starts at zero; leave it out",
                stacklevel=4,
            )
        self.probability("lora_dropout", "beta1", "beta2")
        self.one_of("bias", self.bias, ("none", "all", "lora_only"))
        if self.target_r > self.init_r:
            warnings.warn(
                f"AdaLoraConfig: target_r={self.target_r} exceeds init_r={self.init_r}, so every layer keeps its "
                f"{self.init_r} triplets; set init_r above target_r to let AdaLoRA allocate ranks",
                stacklevel=4,
            )
        if self.orth_reg_weight < 0:
            raise ConfigError(f"AdaLoraConfig: orth_reg_weight must not be negative; got {self.orth_reg_weight}")
        if self.total_step is not None and self.tinit + self.tfinal >= self.total_step:
            raise ConfigError(
                f"AdaLoraConfig: tinit + tfinal must be below total_step={self.total_step} so that the budget can "
                f"fall; got {self.tinit} + {self.tfinal}"
            )

    @classmethod
    def schedule_options(cls, total_steps: int, warmup_share: float, final_share: float) -> dict[str, Any]:
        return {
            "tinit": int(warmup_share * total_steps),
            "tfinal": int(final_share * total_steps),
            "total_step": total_steps,
        }

    def take_factors(self, tensors: dict[str, Tensor]) -> dict[str, Factors]:
        scaling, layers = scaling_of(self), {}
        for path in [key.removesuffix(".lora_E") for key in tensors if key.endswith(".lora_E")]:
            a, b, e = (tensors.pop(f"{path}.lora_{letter}") for letter in "ABE")
            layers[path] = Factors((a * e)[None], b[None], scaling)
        return layers

    @property
    def final_step(self) -> int:
        """Step from which the budget is final."""
        if self.total_step is None:
            raise TrainingError("ADALORA: training needs total_step, the number of optimiser steps; set it")
        return self.total_step - self.tfinal

    def budget(self, step: int, layers: int) -> int:
        """Return the number of triplets kept in the whole model at `step` (from 1), for a number of adapted layers."""
        start, end = self.init_r * layers, min(self.target_r, self.init_r) * layers
        if step <= self.tinit:
            return start
        if step >= self.final_step:
            return end
        left = 1 - (step - self.tinit) / (self.final_step - self.tinit)
        return end + int((start - end) * left**3)

    def mask_at(self, path: str) -> list[bool] | None:
        """Return the saved mask of the layer at `path`; None if this configuration has none."""
        return None if self.rank_pattern is None else self.rank_pattern.get(f"{path}.lora_E")


@register("ADALORA", AdaLoraConfig)
class AdaLora(Adapter):
    """AdaLoRA at one layer."""

    layer_kinds = frozenset({"linear", "conv"})
    dropout_option = "lora_dropout"
    regularizes_model_loss = True

    def __init__(self, config: AdaLoraConfig, base: BaseWeight, path: str):
        super().__init__(config, base, path)
        if base.kind == "conv" and base.layer.groups > 1:
            raise ConfigError(f"ADALORA: {path} is a convolution with groups, which AdaLoRA does not adapt; exclude it")
        mask = config.mask_at(path)
        kept = torch.tensor([True] * config.init_r if mask is None else mask, device="cpu").flatten().bool()
        if len(kept) != config.init_r:
            raise ConfigError(
                f"ADALORA: rank_pattern at {path} must have one entry for each of the {config.init_r} triplets; "
                f"got {len(kept)}"
            )
        r = int(kept.sum())
        self.scaling, self.scaling_unit = scaling_of(config), _denominator(config)
        self.add_dropout()
        self.random = config.init_lora_weights is False
        self.lora_A_weight = nn.Parameter(torch.empty(r, base.in_features * math.prod(base.kernel)))
        self.lora_B_weight = nn.Parameter(torch.empty(base.out_features, r))
        self.lora_E_weight = nn.Parameter(torch.empty(r, 1))
        self.kept = kept
        """Mask of the init_r triplets that the budget keeps; the parameters may still hold all of them."""
        self.importance: dict[str, tuple[Tensor, Tensor]] = {}
        """{parameter: (Ī, Ū)}, float32, from the first gradient on."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for parameter in (self.lora_A_weight, self.lora_E_weight, self.lora_B_weight, torch.empty(1, device="cpu")):
            normal_(parameter)  # PEFT's fourth is the number of triplets
        if not self.random:
            nn.init.zeros_(self.lora_E_weight)
            normal_(self.lora_A_weight, std=0.02)
            normal_(self.lora_B_weight, std=0.02)

    @property
    def rank(self) -> int:
        return int(self.kept.sum())

    def low_rank(self) -> LowRankBranch:
        return LowRankBranch(*self._factors(), self.scaling, self.dropout_probability)

    def factor_names(self) -> FactorNames:
        return FactorNames("lora_A_weight", "lora_B_weight", diagonal="lora_E_weight")

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Return ΛQ and P; for a convolution, as the weights of two convolutions."""
        a, b, kernel = self.lora_A_weight * self.lora_E_weight, self.lora_B_weight, self.base.kernel
        if not kernel:
            return a, b
        return a.view(len(a), self.base.in_features, *kernel), b.view(*b.shape, *(1 for _ in kernel))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = self._factors()
        h = self.base.apply(self.dropped(x), a * self.scaling)
        return self.base.add_pointwise(y, h.to(y.dtype), b)

    def exact_factors(self) -> Factors:
        kept = self.checkpoint_tensors()  # without the triplets that the budget has dropped
        return Factors((kept["lora_A"] * kept["lora_E"])[None], kept["lora_B"][None], self.scaling)

    def delta_weight(self) -> Tensor:
        change = self.scaling * self.lora_B_weight @ (self.lora_A_weight * self.lora_E_weight)
        kernel = self.base.kernel
        return change.view(len(change), -1, *kernel) if kernel else change

    # -- disk: PEFT stores the kept triplets only, and the mask in the configuration -----------------------------

    def _kept_rows(self) -> Tensor:
        """Return the indices of the kept triplets among those that the parameters hold."""
        if len(self.lora_E_weight) == int(self.kept.sum()):
            return torch.arange(len(self.lora_E_weight))
        return self.kept.nonzero().flatten()

    def checkpoint_keys(self) -> dict[str, str]:
        return _KEYS

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        rows = self._kept_rows().to(self.lora_E_weight.device)
        own = {key: getattr(self, name).detach() for name, key in _KEYS.items()}
        return {key: tensor.index_select(_triplet_axis(key), rows) for key, tensor in own.items()}

    @torch.no_grad()
    def load_checkpoint_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        rows = self._kept_rows().to(self.lora_E_weight.device)
        self.lora_E_weight.zero_()  # a triplet that was not saved is one whose λ is zero
        for name, key in _KEYS.items():
            parameter = getattr(self, name)
            parameter.index_copy_(_triplet_axis(key), rows, tensors[key].to(parameter))

    @classmethod
    def config_to_save(cls, config: AdaLoraConfig, adapters: Mapping[str, Adapter]) -> AdaLoraConfig:
        masks = {f"{path}.lora_E": cast(AdaLora, adapter).kept.tolist() for path, adapter in adapters.items()}
        return replace(config, rank_pattern=masks if any(not all(mask) for mask in masks.values()) else None)

    # -- training --------------------------------------------------------------------------------------------

    @classmethod
    def regularizer(cls, config: AdaLoraConfig, adapters: Mapping[str, Adapter]) -> Tensor | None:
        """Return orth_reg_weight · mean over matrices of ‖PᵀP − I‖² and ‖QQᵀ − I‖² (Frobenius, squared)."""
        if not config.orth_reg_weight:
            return None
        terms = []
        for adapter in cast(Mapping[str, AdaLora], adapters).values():
            for gram in (
                adapter.lora_B_weight.T @ adapter.lora_B_weight,
                adapter.lora_A_weight @ adapter.lora_A_weight.T,
            ):
                identity = torch.eye(len(gram), device=gram.device, dtype=gram.dtype)
                terms.append((gram - identity).square().sum())
        return config.orth_reg_weight * torch.stack(terms).mean()

    @classmethod
    @torch.no_grad()
    def on_step(
        cls,
        config: AdaLoraConfig,
        adapters: Mapping[str, Adapter],
        step: int,
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        layers = list(cast(Mapping[str, AdaLora], adapters).values())
        pruned = any(len(adapter.lora_E_weight) != len(adapter.kept) for adapter in layers)
        left, end = sum(int(adapter.kept.sum()) for adapter in layers), config.target_r * len(layers)
        if pruned or (step > config.final_step and left <= end):
            for adapter in layers:
                adapter._silence_dropped()
            return
        for adapter in layers:
            adapter._update_importance(config)
        if step >= config.final_step or (step > config.tinit and step % config.deltaT == 0):
            _keep_best(layers, config.budget(step, len(layers)))
        if step >= config.final_step and optimizer is not None:
            for adapter in layers:
                adapter._prune(optimizer)

    def _update_importance(self, config: AdaLoraConfig) -> None:
        for name, key in _KEYS.items():
            parameter = getattr(self, name)
            if parameter.grad is None:
                continue
            now = (parameter * parameter.grad).float().abs()
            mean, spread = self.importance.get(key) or (torch.zeros_like(now), torch.zeros_like(now))
            mean = config.beta1 * mean + (1 - config.beta1) * now
            spread = config.beta2 * spread + (1 - config.beta2) * (now - mean).abs()
            self.importance[key] = (mean, spread)

    def scores(self) -> Tensor:
        """Return the score S (r,) of each triplet, float32; zeros before the first gradient."""
        if not self.importance:
            return torch.zeros(len(self.lora_E_weight), device=self.lora_E_weight.device)
        score = {key: mean * spread for key, (mean, spread) in self.importance.items()}
        return score["lora_E"].flatten() + score["lora_B"].mean(0) + score["lora_A"].mean(1)

    def _silence_dropped(self) -> None:
        if len(self.lora_E_weight) == len(self.kept):
            self.lora_E_weight[~self.kept.to(self.lora_E_weight.device)] = 0

    def _prune(self, optimizer: torch.optim.Optimizer) -> None:
        """Shrink the parameters and the optimiser's moments to the triplets that are kept.

        If the optimiser's state has an unknown form, the tensors stay masked instead.
        """
        if not all(can_prune(getattr(self, name), optimizer) for name in _KEYS):
            return
        rows = self._kept_rows().to(self.lora_E_weight.device)
        for name, key in _KEYS.items():
            setattr(self, name, pruned(getattr(self, name), _triplet_axis(key), rows, optimizer))
        self.importance = {}

    def training_state(self) -> dict[str, Tensor]:
        """Return the whole tensors (masked triplets too), the mask, and Ī, Ū by parameter."""
        state = {key: getattr(self, name).detach().clone() for name, key in _KEYS.items()} | {"kept": self.kept}
        for key, (mean, spread) in self.importance.items():
            state |= {f"{key}.mean": mean, f"{key}.spread": spread}
        return state

    @torch.no_grad()
    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        self.kept = state["kept"].cpu()
        self.importance = {}
        for name, key in _KEYS.items():
            parameter = getattr(self, name)
            parameter.data = state[key].to(parameter, copy=True)
            if f"{key}.mean" in state:
                device = parameter.device
                self.importance[key] = (state[f"{key}.mean"].to(device), state[f"{key}.spread"].to(device))


def scaling_of(config: AdaLoraConfig) -> float:
    """Return s = α/init_r, with PEFT's denominator."""
    alpha = config.lora_alpha if config.lora_alpha > 0 else float(config.init_r)
    return alpha / _denominator(config)


def _denominator(config: AdaLoraConfig) -> float:
    return config.init_r + 1e-5


def _triplet_axis(key: str) -> int:
    """Return the axis of a tensor that indexes the triplets."""
    return 1 if key == "lora_B" else 0


def _keep_best(layers: list[AdaLora], budget: int) -> None:
    """Keep exactly the `budget` best triplets of all layers (ties: the earlier layer, then the lower index)."""
    scores = torch.cat([adapter.scores().cpu() for adapter in layers])
    order = torch.argsort(scores, descending=True, stable=True)
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[order[:budget]] = True
    for adapter, mask in zip(layers, kept.split([len(a.kept) for a in layers]), strict=True):
        adapter.kept = mask
        adapter._silence_dropped()
