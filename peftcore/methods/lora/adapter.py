"""LoRA: y = Wx + b + s·B(A x), s = α/r. arXiv:2106.09685. Variants (DoRA, rsLoRA, PiSSA, ...) are in `variants/`.

An initialisation that subtracts its start from the base (PiSSA) is computed as ΔW = s(BA − B₀A₀) on the unchanged base.
The numbers are the same, and other adapters, disabling and unloading see the true base. On disk it is LoRA of rank 2r.
After `set_start_subtraction("base")`, W − s·B₀A₀ takes the place of W, and the adapter has rank r, as in HF PEFT.

Shapes: i in_features, o out_features, r rank, k kernel; A (r, i, *k), B (o, r, *1). On an embedding of v rows of size
d: A (r, v), B (d, r), and A starts at zero instead of B. Of e experts: A (e·r, i), B (o, r·e).
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftcore.adapter import Adapter, FactorNames, Shared
from peftcore.bases import BaseWeight, ParameterWeight
from peftcore.errors import ConfigError, MergeError
from peftcore.kernels.factors import Factors
from peftcore.kernels.low_rank import LowRankBranch
from peftcore.kernels.maths import widened
from peftcore.kernels.start_subtraction import get_start_subtraction
from peftcore.methods.lora.config import LoraConfig
from peftcore.methods.lora.variant import Variant
from peftcore.registry import register


@register("LORA", LoraConfig)
class Lora(Adapter):
    """LoRA at one layer."""

    layer_kinds = frozenset({"linear", "conv", "embedding", "parameter"})
    dropout_option = "lora_dropout"
    unrounded = frozenset({"lora_magnitude_vector_weight"})  # DoRA would not start at the base's own output
    config: LoraConfig
    r: int
    scaling: Any
    """s: a number; after `peftcore.methods.lora.hotswap.use_tensor_scaling` a tensor without dimensions."""
    groups: int
    """Groups of a convolution; 1 for other layers."""
    variants: tuple[Variant, ...]
    """Variants whose hooks this layer calls; empty for plain LoRA, whatever its scaling and initialisation."""
    lora_A_weight: nn.Parameter
    lora_B_weight: nn.Parameter
    start_in_base: bool
    """True if the start was subtracted from the base weight itself."""
    source: "Lora | None"
    """The embedding's LoRA whose factors this layer uses, if both share one base weight; a head uses the transposes."""

    def __init__(self, config: LoraConfig, base: BaseWeight, path: str):
        super().__init__(config, base, path)
        vars(self)["config"] = config
        vars(self)["frozen"] = frozenset[str]().union(*(variant.frozen for variant in config.variants()))
        r, alpha = config.at(path)
        groups = base.layer.groups if base.kind == "conv" else 1
        if r % groups:
            raise ConfigError(f"LORA: r at {path} must be a multiple of its {groups} groups, got {r}; try {groups}")
        vars(self).update(r=r, scaling=self.scaling_for(r, alpha), groups=groups, source=None, start_in_base=False)
        if base.kind != "embedding":
            self.add_dropout()
        self._buffers.update(start_A=None, start_B=None)
        rows = r * base.count
        a = torch.empty(rows, base.in_features, *base.kernel)
        b = torch.empty(base.out_features, rows // groups, *(1 for _ in base.kernel))
        self._parameters.update(lora_A_weight=nn.Parameter(a), lora_B_weight=nn.Parameter(b))
        vars(self)["variants"] = tuple(self._add_variants(path))

    def _add_variants(self, path: str) -> list[Variant]:
        variants = [variant for variant in self.config.variants() if variant.changes_layers]
        for variant in variants:
            if self.base.kind not in variant.layer_kinds:
                kind = {"parameter": "a raw parameter", "embedding": "an embedding"}.get(
                    self.base.kind, f"a {self.base.kind} layer"
                )
                raise ConfigError(f"LORA: {variant.option} does not fit {path}, {kind}; exclude it")
            variant.check_layer(self, path)
            variant.add_parameters(self)
        return variants

    def scaling_for(self, r: int, alpha: float) -> float:
        """Return the scaling s of this layer for a rank and an α of its configuration."""
        scaling = alpha / self.config.denominator(r)
        # HF PEFT adds the change of nn.MultiheadAttention's output twice, so its files mean that
        is_attention_output = isinstance(self.base, ParameterWeight) and self.base.owner_path == "out_proj"
        return 2 * scaling if is_attention_output else scaling

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "scaling" and isinstance(present := vars(self).get(name), Tensor):
            present.fill_(value)  # a new object would make compiled code compile again
            self.mark_changed()
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if isinstance(self.scaling, Tensor):
            vars(self)["scaling"] = self.scaling.to(self.own_factors()[0].device)
        return self

    # -- factors ---------------------------------------------------------------------------------------------

    def own_factors(self) -> tuple[Tensor, Tensor]:
        """Return A and B, without a subtracted start."""
        a, b = self._stored_factors()
        for variant in self.variants:
            a, b = variant.computed_factors(self, a, b)
        return a, b

    def _stored_factors(self) -> tuple[Tensor, Tensor]:
        """Return the tensors of A and B that train and are saved."""
        if self.source is None:
            return self.lora_A_weight, self.lora_B_weight
        if self.base.kind == self.source.base.kind:
            return self.source.lora_A_weight, self.source.lora_B_weight
        return self.source.lora_B_weight.T, self.source.lora_A_weight.T

    def _with_start(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return A and B with the subtracted start stacked below, so that their product is all of ΔW / s."""
        start = self.start
        return (a, b) if start is None else (torch.cat([a, start[0]]), torch.cat([b, -start[1]], 1))

    def trained_factors(self) -> LowRankBranch | None:
        if self.source is not None or self.config.packs_factors:
            return None
        return LowRankBranch(self.lora_A_weight, self.lora_B_weight, self.scaling)

    def set_factors(self, a: Tensor, b: Tensor) -> None:
        """Copy values into A and B."""
        self.lora_A_weight.copy_(a.view_as(self.lora_A_weight))
        self.lora_B_weight.copy_(b.view_as(self.lora_B_weight))

    def follow(self, source: "Lora") -> None:
        """Use the factors of an embedding's adapter, and drop this adapter's own A and B."""
        self.source, self.lora_A_weight, self.lora_B_weight = source, None, None  # type: ignore[assignment]

    @property
    def start(self) -> tuple[Tensor, Tensor] | None:
        """A₀ and B₀ of the start that is subtracted from the base; None for initialisations that subtract nothing."""
        a, b = self._buffers["start_A"], self._buffers["start_B"]
        return None if a is None or b is None else (a, b)

    def subtract_start(self) -> None:
        """Keep copies of A and B as A₀ and B₀, so that the layer subtracts the present s·BA from now on."""
        copies = (
            f.detach().clone(memory_format=torch.contiguous_format) for f in (self.lora_A_weight, self.lora_B_weight)
        )
        self.start_A, self.start_B = copies

    @classmethod
    @torch.no_grad()
    def all_placed(cls, adapters: Mapping[str, Adapter]) -> bool:
        distinct = dict.fromkeys(adapters.values())  # a layer may stand at several paths
        loras = [a for a in distinct if isinstance(a, Lora) and a.start is not None]
        if get_start_subtraction() == "adapter" or not all(lora.base.holds_its_own_weight for lora in loras):
            return False
        for lora in loras:
            assert lora.start is not None
            weight = widened(lora.base.read())
            lora.base.write(weight - lora._product(*(factor.to(weight) for factor in lora.start)))
            lora.base.clear_cache()
            lora.start_A = lora.start_B = None
            lora.start_in_base = True
            lora.mark_changed()
        return bool(loras)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.start_A = self.start_B = self.new_base = None
        self.start_in_base = False
        self.config.initialisation().initialise(self)
        self.reset_variants()

    @torch.no_grad()
    def reset_variants(self) -> None:
        """Set the start values of the variants' parameters for the present A and B."""
        for variant in self.variants:
            variant.reset_parameters(self)

    def prepare_to_read(self) -> None:
        start = self.config.initialisation()
        if start.reads_base or (start.subtracts and start.prepared_for(self) is not None):
            self.reset_parameters()
        else:
            for variant in self.variants:
                variant.prepare_to_read(self)

    def placed(self) -> None:
        if (prepared := self.config.initialisation().prepared) is not None:
            vars(self.base.layer).pop(prepared, None)

    @classmethod
    def link(cls, config: LoraConfig, adapters: Mapping[str, Adapter]) -> None:
        for variant in config.variants():
            variant.link(config, cast(Mapping[str, Lora], adapters))

    # -- forward ---------------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        return self.r

    @property
    def change_rank(self) -> int:
        return self.r if self.start is None or self.exact_factors() is None else 2 * self.r

    @property
    def sees_others(self) -> bool:
        return any(variant.sees_others for variant in self.variants)

    @property
    def is_additive(self) -> bool:
        return all(variant.is_additive for variant in self.variants)

    def low_rank(self) -> LowRankBranch | None:
        own = self._parameters  # attributes of a module are slow to read, and this runs in every layer's forward
        dropout = self.dropout_probability if "dropout" in self._modules else 0.0
        if not self.variants and self.computes_with_parameters():
            return LowRankBranch(own["lora_A_weight"], own["lora_B_weight"], self.scaling, dropout)  # type: ignore[arg-type]
        if dropout and self.start is not None:
            return None  # the subtracted start sees the whole input
        branch: LowRankBranch | None = LowRankBranch(*self._with_start(*self.own_factors()), self.scaling, dropout)
        for variant in self.variants:
            if (branch := variant.low_rank(self, branch)) is None:
                return None
        return branch

    def factor_names(self) -> FactorNames | None:
        if not self.computes_with_parameters():
            return None
        if not self.variants:
            return FactorNames("lora_A_weight", "lora_B_weight")
        has_gain = len(self.variants) == 1 and self.variants[0].is_gain
        return FactorNames("lora_A_weight", "lora_B_weight", has_gain=True) if has_gain else None

    def output_gain(self) -> Tensor | None:
        return self.variants[0].output_gain(self)

    def computes_with_parameters(self) -> bool:
        """Return True if A and B are this adapter's own parameters, and no start is subtracted."""
        return self.source is None and self._buffers["start_A"] is None

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        variants = self.variants
        for variant in variants:
            if (change := variant.change(self, x)) is not None:
                return y + change.to(y.dtype)
        dropped = self.dropped(x)
        a, b = self.own_factors()
        for variant in variants:
            if (h := variant.product(self, dropped, a)) is not None:
                break
        else:
            h = self.base.apply(dropped, a)  # (..., r): scaling this costs less than scaling the output
        for variant in variants:
            h = variant.hidden(self, h)
        h = h.to(y.dtype) * self.scaling
        y = self.base.add_pointwise(y, h, b)
        if self.start is not None:
            y = y - self.start_output(x, y.dtype)
        for variant in variants:
            y = variant.output(self, y, x, dropped, h)
        return y

    def start_output(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return s·B₀A₀x (..., o), the output of the subtracted start."""
        assert self.start is not None
        return self.base.pointwise(self.base.apply(x, self.start[0]).to(dtype) * self.scaling, self.start[1])

    @classmethod
    def make_shared(cls, config: LoraConfig, bases: Mapping[str, BaseWeight]) -> Shared | None:
        shared = [state for v in config.variants() if (state := v.make_shared(config, bases)) is not None]
        if len(shared) > 1:
            names = ", ".join(variant.option for variant in config.variants())
            raise ConfigError(
                f"LORA: of the variants {names}, several have state that all layers share, and only one can; leave one "
                "out"
            )
        return shared[0] if shared else None

    @classmethod
    def forward_arguments(cls, config: LoraConfig) -> frozenset[str] | None:
        names = [own for variant in config.variants() if (own := variant.forward_arguments(config)) is not None]
        return frozenset().union(*names) if names else None

    @classmethod
    def before_forward(
        cls, config: LoraConfig, adapters: Mapping[str, Adapter], model: nn.Module, inputs: dict[str, Any]
    ) -> None:
        shared = next(iter(adapters.values())).shared
        for variant in config.variants():
            variant.before_forward(config, shared, inputs)

    @classmethod
    def refused_generate_options(cls, config: LoraConfig) -> Mapping[str, str]:
        return {
            option: reason
            for variant in config.variants()
            for option, reason in variant.refused_generate_options.items()
        }

    # -- merged ----------------------------------------------------------------------------------------------

    def check_mergeable(self) -> None:
        for variant in self.variants:
            variant.check_mergeable(self)
        if self.groups > 1:
            raise MergeError(
                "LORA on a convolution with groups has no merged weight: A mixes the groups that W keeps apart; "
                "keep the adapter unmerged or exclude this layer"
            )

    def exact_factors(self) -> Factors | None:
        a, b = self._with_start(*self.own_factors())
        experts = self.base.count
        a = a.reshape(experts, len(a) // experts, -1)
        factors: Factors | None = Factors(a, b.reshape(len(b), -1, experts).permute(2, 0, 1), float(self.scaling))
        for variant in self.variants:
            if (factors := variant.exact_factors(self, factors)) is None:
                return None
        return factors

    def delta_weight(self) -> Tensor:
        """Return s·BA − s·B₀A₀, before the variants."""
        return self._product(*self.own_factors()) - (0 if self.start is None else self._product(*self.start))

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        if self.base.kind == "parameter":
            experts = self.base.count
            a, b = a.view(experts, self.r, -1), b.view(b.shape[0], self.r, experts)
            return self.scaling * torch.einsum("ore,eri->eoi", b, a).reshape(self.base.read().shape)
        return self.scaling * (b.flatten(1) @ a.flatten(1)).view(b.shape[0], *a.shape[1:])

    def changes_like(self, other: Adapter) -> bool:
        if not isinstance(other, Lora) or self.variants or other.variants:
            return False
        return (self.source or self) is (other.source or other) and self.scaling == other.scaling

    def merged_weight(self, weight: Tensor) -> Tensor:
        if self.base.kind == "linear" and self.start is None:
            a, b = self.own_factors()
            merged = torch.addmm(weight, b.to(weight), a.to(weight), alpha=float(self.scaling))
        else:
            merged = super().merged_weight(weight)
        for variant in self.variants:
            merged = variant.merged_weight(self, merged)
        return merged

    def merge_into(self, weight: Tensor) -> Tensor:
        if self.base.kind != "linear" or self.start is not None or self.variants:
            return self.merged_weight(weight)
        a, b = self.own_factors()
        return weight.addmm_(b.to(weight), a.to(weight), alpha=float(self.scaling))

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        for variant in self.variants:
            bias = variant.merged_bias(self, bias)
        return bias

    def bias_change(self) -> Tensor | None:
        changes = [change for variant in self.variants if (change := variant.bias_change(self)) is not None]
        return sum(changes[1:], changes[0]) if changes else None

    # -- training --------------------------------------------------------------------------------------------

    @classmethod
    def regularizer(cls, config: LoraConfig, adapters: Mapping[str, Adapter]) -> Tensor | None:
        loras = cast(Mapping[str, Lora], adapters)
        terms = [term for v in config.variants() if (term := v.regularizer(config, loras)) is not None]
        return sum(terms[1:], terms[0]) if terms else None

    # -- disk ------------------------------------------------------------------------------------------------

    def shown_parameter(self, name: str) -> Tensor:
        if self.source is not None and name in ("lora_A_weight", "lora_B_weight"):
            return self.own_factors()[name == "lora_B_weight"][:]  # a view, because assigning it would change nothing
        return super().shown_parameter(name)

    def checkpoint_keys(self) -> dict[str, str]:
        weight = "lora_{}.weight" if self.base.kind != "embedding" else "lora_embedding_{}"
        keys = {"lora_A_weight": weight.format("A"), "lora_B_weight": weight.format("B")}
        for variant in self.variants:
            keys |= variant.keys
        return keys

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        key_a, key_b, *_ = self.checkpoint_keys().values()
        a, b = self._with_start(*self._stored_factors())
        tensors = {key_a: a.detach(), key_b: b.detach()}
        for variant in self.variants:
            tensors |= variant.checkpoint_tensors(self)
        return tensors

    def fits(self, key: str, tensor: Tensor) -> bool:
        keys = list(self.checkpoint_keys().values())[:2]
        if key not in keys or self.source is not None:
            return super().fits(key, tensor)
        axis = keys.index(key)
        shape = (self.lora_A_weight, self.lora_B_weight)[axis].shape
        subtracts = self.config.initialisation().subtracts and not self.start_in_base
        has_start = self.start is not None or subtracts  # then stacked to rank 2r
        ranks = [shape[axis], 2 * shape[axis]] if has_start else [shape[axis]]
        return any(tensor.shape == (*shape[:axis], rank, *shape[axis + 1 :]) for rank in ranks)

    def load_checkpoint_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self._warn_without_start(tensors)
        for name, key in self.checkpoint_keys().items():
            if self.source is not None and name in ("lora_A_weight", "lora_B_weight"):
                continue  # these repeat the embedding's tensors
            parameter, saved = self._parameter(name), tensors[key]
            if name in ("lora_A_weight", "lora_B_weight") and saved.shape != parameter.shape:
                axis, buffer = (0, "start_A") if name == "lora_A_weight" else (1, "start_B")
                saved, start = saved.split(parameter.shape[axis], axis)
                setattr(self, buffer, (start if axis == 0 else -start).to(parameter).contiguous())
            self._put(parameter, saved if saved.shape == parameter.shape else saved.reshape(parameter.shape))

    def _warn_without_start(self, tensors: Mapping[str, Tensor]) -> None:
        """Warn of trained factors without the start that belongs to them, which only data give (CorDA, LoRA-GA)."""
        subtracts = self.config.initialisation().subtracts
        if not subtracts or self.start is not None or self.start_in_base or self.source is not None:
            return
        key = self.checkpoint_keys()["lora_B_weight"]
        if tensors[key].shape == self.lora_B_weight.shape and tensors[key].any():
            warnings.warn(
                f"this adapter with init_lora_weights={self.config.init_lora_weights!r} was saved without its start, "
                "so it fits only the base from which the start was subtracted; for the original base, save it with "
                "path_initial_model_for_weight_conversion",
                stacklevel=2,
            )

    @classmethod
    def config_to_save(cls, config: LoraConfig, adapters: Mapping[str, Adapter]) -> LoraConfig:
        has_start = any(cast(Lora, adapter).start is not None for adapter in adapters.values())
        if config.initialisation().is_plain_on_disk:
            return replace(config, init_lora_weights=True)
        return config.with_stacked_start() if has_start else config
