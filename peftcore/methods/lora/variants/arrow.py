"""Arrow: a router over the other LoRAs of its layers: y = Wx + b + Σ_e w_e(x) s_e B_e A_e x. arXiv:2405.11157.

The weights w of the experts e depend on the token (`peftcore.kernels.arrow`). Nothing is trained: the router's own A
and B, which HF PEFT's files have, are not used. Experts are all LoRAs of the layer that are neither routers nor
general adapters. General adapters are those of `gks_adapter_names`, and those named `gks_` and a number.

GenKnowSub (Bagherifard et al., ACL 2025) subtracts the means Ā and B̄ of the general adapters: the experts are
(B_e − B̄)(A_e − Ā). The adapters themselves keep their weights.
Shapes: i in_features, o out_features, r rank, m experts; x (..., i).
"""

import re
from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from peftcore._util.fingerprint import Fingerprint
from peftcore.errors import ConfigError, MergeError, RoutingError
from peftcore.kernels.arrow import iterated_prototype, token_weights
from peftcore.kernels.factors import Factors
from peftcore.methods.lora.options import Options
from peftcore.methods.lora.variant import Variant, register_variant

if TYPE_CHECKING:
    from peftcore.methods.lora.adapter import Lora
    from peftcore.methods.lora.config import LoraConfig

_GENERAL = re.compile(r"gks_\d+")
_STARTS = "_arrow_starts"
"""Attribute of the router: (names of the experts, start vectors (m, i) of their power iterations)."""
_PROTOTYPES: MutableMapping[Any, tuple[tuple[str, ...], Fingerprint, Tensor]] = WeakKeyDictionary()
"""{router: (names of the experts, fingerprint of their weights, prototypes (m, i))}; no copy of a router has them."""


class ArrowConfig(Options):
    """Options of Arrow, for `LoraConfig(arrow_config=...)` and `create_arrow_model`. arXiv:2405.11157.

    `task_adapter_names` and `gks_adapter_names`, the names of the experts and of the general adapters, are set by
    `create_arrow_model`.

    Args:
        top_k: experts per token (count); all if a layer has fewer.
        router_temperature: temperature of the softmax over the experts.
        use_gks: subtract the mean of the general adapters from each expert (GenKnowSub).
        rng_seed: seed of the vector at which the search for a prototype starts; None takes PyTorch's generator.

    Raises:
        ConfigError: `top_k` is below 1, or `router_temperature` not above 0.
    """

    def __init__(
        self,
        top_k: int = 3,
        router_temperature: float = 1.0,
        use_gks: bool = False,
        rng_seed: int | None = None,
    ):
        if top_k < 1:
            raise ConfigError(f"ArrowConfig: top_k must be at least 1; got {top_k!r}")
        if router_temperature <= 0:
            raise ConfigError(f"ArrowConfig: router_temperature must be above 0; got {router_temperature!r}")
        super().__init__(
            top_k=top_k,
            router_temperature=router_temperature,
            use_gks=use_gks,
            task_adapter_names=None,
            gks_adapter_names=None,
            rng_seed=rng_seed,
        )

    @classmethod
    def made_from(cls, values: dict[str, Any], field: str) -> Options:
        if isinstance(values, cls):
            return values
        set_later = {key: values[key] for key in ("task_adapter_names", "gks_adapter_names") if key in values}
        options = super().made_from({key: value for key, value in values.items() if key not in set_later}, field)
        options.update(set_later)
        return options


@register_variant
class Arrow(Variant):
    """Variant for `arrow_config=ArrowConfig(...)`: a router over the other LoRAs of the layer."""

    option = "arrow_config"
    options_class = ArrowConfig
    stands_alone = True
    sees_others = True
    frozen: ClassVar = frozenset({"lora_A_weight", "lora_B_weight"})
    excludes: ClassVar = {"lora_bias": "a router has no change of its own"}
    beyond_low_rank = "Arrow weights other LoRAs for each token, which no fixed change equals; use one of these LoRAs"

    def check(self, config: "LoraConfig") -> None:
        if config.init_lora_weights not in (True, False, "gaussian"):
            raise ConfigError(
                f"LoraConfig: init_lora_weights={config.init_lora_weights!r} has no meaning with arrow_config, because "
                "a router has no change of its own; use init_lora_weights=True"
            )

    def change(self, lora: "Lora", x: Tensor) -> Tensor:
        options = _options(lora)
        experts = _experts(lora)
        a = torch.cat([factors.a[0] for factors in experts.values()])
        b = torch.cat([factors.b[0] * factors.scaling for factors in experts.values()], 1)
        prototypes: Tensor = _prototypes(lora, experts)  # type: ignore[call-arg]
        weights = token_weights(x, prototypes, options["top_k"], options["router_temperature"])
        columns = zip(weights.split(1, -1), experts.values(), strict=True)
        by_row = torch.cat([weight.expand(*x.shape[:-1], factors.rank) for weight, factors in columns], -1)
        change = lora.base.pointwise(lora.base.apply(x, a) * by_row, b)
        p = lora.dropout_probability
        return F.dropout(change, p) if p else change  # HF PEFT drops elements of the output

    def check_mergeable(self, lora: "Lora") -> None:
        raise MergeError(
            "Arrow weights other LoRAs for each token, so no weight equals it; keep it unmerged, or merge one of them"
        )

    def exact_factors(self, lora: "Lora", factors: Factors) -> None:
        return None


def _options(lora: "Lora") -> dict[str, Any]:
    options = lora.config.arrow_config
    assert options is not None
    return options


def _is_general(name: str, options: Mapping[str, Any]) -> bool:
    return name in (options["gks_adapter_names"] or ()) or _GENERAL.fullmatch(name) is not None


def _experts(lora: "Lora") -> dict[str, Factors]:
    """Return {name: A (1, r, i), B (1, o, r) and s} of the experts, after the subtraction of the general adapters."""
    options, path = _options(lora), lora.printed[1]
    loras = {
        n: each for n, each in lora.beside.items() if isinstance(each, type(lora)) and not each.config.arrow_config
    }
    general = [_factors(name, each, path) for name, each in loras.items() if _is_general(name, options)]
    experts = {name: _factors(name, each, path) for name, each in loras.items() if not _is_general(name, options)}
    if not experts:
        raise RoutingError(f"Arrow at {path}: there is no LoRA to route to; load the LoRAs first (create_arrow_model)")
    if not options["use_gks"]:
        return experts
    if not general:
        raise RoutingError(
            f"Arrow at {path}: use_gks=True subtracts general adapters, and none is loaded; load them as gks_0, gks_1, "
            "... or set use_gks=False"
        )
    ranks = {name: factors.rank for name, factors in experts.items()}
    if {*ranks.values()} != {factors.rank for factors in general} or len({*ranks.values()}) > 1:
        raise RoutingError(f"Arrow at {path}: use_gks=True needs LoRAs of one rank; got {ranks}")
    mean_a = torch.stack([factors.a for factors in general]).mean(0).detach()
    mean_b = torch.stack([factors.b for factors in general]).mean(0).detach()
    return {name: e._replace(a=e.a - mean_a, b=e.b - mean_b) for name, e in experts.items()}


def _factors(name: str, lora: "Lora", path: str) -> Factors:
    if (factors := routed_factors(lora)) is None:
        raise RoutingError(f"Arrow routes plain LoRAs; {name!r} at {path} is a variant of LoRA; delete it")
    return factors


def routed_factors(lora: "Lora") -> Factors | None:
    """Return A (1, r, i), B (1, o, r) and s of a LoRA; None if its layer computes more than s·BA x."""
    does_more = lora.config.beyond_low_rank() or lora.config.bias != "none"
    return None if does_more else lora.exact_factors()


@torch.compiler.disable
def _prototypes(lora: "Lora", experts: Mapping[str, Factors]) -> Tensor:
    """Return the prototypes (m, i) of the experts, from the last forward pass if no weight has changed since."""
    names, cached = tuple(experts), _PROTOTYPES.get(lora)
    if cached is not None and cached[0] == names and cached[1].holds(trusts_learning=True):
        return cached[2]
    fingerprint = Fingerprint(lora.beside.values())
    with torch.inference_mode(False), torch.no_grad():
        starts = _starts(lora, experts)
        found = [iterated_prototype(e.a[0], e.b[0], v) for e, v in zip(experts.values(), starts, strict=True)]
        prototypes = torch.stack(found)
    _PROTOTYPES[lora] = names, fingerprint, prototypes
    return prototypes


def _starts(lora: "Lora", experts: Mapping[str, Factors]) -> Tensor:
    """Return the start vectors (m, i), drawn as HF PEFT draws them; new ones only for other experts."""
    names, drawn = tuple(experts), vars(lora).get(_STARTS)
    if drawn is None or drawn[0] != names:
        seed, vectors = _options(lora)["rng_seed"], []
        for factors in experts.values():
            device = factors.a.device
            generator = None if seed is None else torch.Generator(device=device).manual_seed(int(seed))
            vectors.append(torch.randn(factors.a.shape[-1], device=device, dtype=torch.float32, generator=generator))
        drawn = vars(lora)[_STARTS] = names, torch.stack(vectors)
    return drawn[1]
