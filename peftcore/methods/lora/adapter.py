"""LoRA: y = Wx + b + s·B(A x), s = α/r, or α/√r with rsLoRA. arXiv:2106.09685, arXiv:2312.03732.

DoRA (arXiv:2402.09353): W' = m/n·(W + sBA), n the length of each output row of W₀ + sBA, without gradient.
A start that takes sB₀A₀ out of the base (PiSSA, ...) is kept as ΔW = s(BA − B₀A₀), the base stays as it is: equal
numbers, and other adapters, disabling and unloading see the true base. On disk that is plain LoRA of rank 2r.

Shapes: i in_features, o out_features, r rank, k kernel; A (r, i, *k), B (o, r, *1), m (o,). On an embedding of v
rows of size d: A (r, v), B (d, r), and A starts at zero instead of B. Experts e: A (e·r, i), B (o, r·e).
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight, ParameterWeight
from peftcore.bases.base import WeightVersion
from peftcore.errors import ConfigError, MergeError
from peftcore.kernels.factors import Factors
from peftcore.kernels.low_rank import LowRankBranch
from peftcore.methods.lora import invocation, starts
from peftcore.methods.lora.config import LoraConfig
from peftcore.registry import register


@register("LORA", LoraConfig)
class Lora(Adapter):
    """LoRA at one layer."""

    layer_kinds = frozenset({"linear", "conv", "embedding", "parameter"})
    config: LoraConfig
    r: int
    scaling: float
    dropout: float
    groups: int
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_bias: nn.Parameter | None
    magnitude: nn.Parameter | None
    source: "Lora | None"
    """The embedding's LoRA that this head's follows, transposed, where both share one base weight."""
    _row_norms: tuple[WeightVersion, Tensor] | None
    """(the base weight that they were taken of, ‖W‖² by rows (o,))."""

    def __init__(self, config: LoraConfig, base: BaseWeight, path: str):
        super().__init__(config, base, path)
        r, alpha = config.at(path)
        scaling = alpha / math.sqrt(r) if config.use_rslora else alpha / r
        if isinstance(base, ParameterWeight) and base.owner_path == "out_proj":
            scaling *= 2  # HF PEFT adds the change of nn.MultiheadAttention's output twice, so its files mean that
        dropout = 0.0 if base.kind == "embedding" else config.lora_dropout
        groups = base.layer.groups if base.kind == "conv" else 1
        vars(self).update(config=config, r=r, scaling=scaling, dropout=dropout, groups=groups)
        vars(self).update(source=None, lora_bias=None, magnitude=None, _row_norms=None)
        self._buffers.update(start_A=None, start_B=None)
        self._check(path)
        rows = r * base.count
        a = torch.empty(rows, base.in_features, *base.kernel)
        b = torch.empty(base.out_features, rows // groups, *(1 for _ in base.kernel))
        self._parameters.update(lora_A=nn.Parameter(a), lora_B=nn.Parameter(b))
        if config.lora_bias:
            self.lora_bias = nn.Parameter(torch.zeros(base.out_features))
        if config.use_dora:
            self.magnitude = nn.Parameter(torch.empty(base.out_features))

    def _check(self, path: str) -> None:
        if self.r % self.groups:
            raise ConfigError(
                f"LORA: r at {path} must be a multiple of its {self.groups} groups, got {self.r}; try {self.groups}"
            )
        if self.base.kind == "parameter":
            for option in ("use_dora", "lora_bias", "alora_invocation_tokens"):
                if getattr(self.config, option):
                    raise ConfigError(f"LORA: {option} does not fit {path}, a raw parameter; exclude it")
        if self.config.use_dora and self.groups > 1:
            raise ConfigError(f"LORA: use_dora does not fit {path}, a convolution with groups; exclude it")
        if self.config.lora_bias and self.base.kind == "embedding":
            raise ConfigError(f"LORA: lora_bias does not fit {path}, an embedding; exclude it")

    @classmethod
    def link(cls, config: LoraConfig, adapters: Mapping[str, Adapter]) -> None:
        if not config.ensure_weight_tying:
            return
        layers = list(cast(Mapping[str, Lora], adapters).values())
        # held, because a parametrised layer makes its weight anew each time, and an id can come back
        weights = [a.base.layer.weight if a.base.kind in ("embedding", "linear") else None for a in layers]
        embeddings = {id(w): a for a, w in zip(layers, weights, strict=True) if a.base.kind == "embedding"}
        for adapter, weight in zip(layers, weights, strict=True):
            source = embeddings.get(id(weight)) if adapter.base.kind == "linear" else None
            if source is not None:
                adapter.source, adapter.lora_A, adapter.lora_B = source, None, None  # type: ignore[assignment]

    def own_factors(self) -> starts.Factors:
        """A and B."""
        if self.source is None:
            return self.lora_A, self.lora_B
        return self.source.lora_B.T, self.source.lora_A.T

    @torch.no_grad()
    def reset_parameters(self) -> None:
        taken_out, self.new_base = starts.begin(self)
        self.start_A, self.start_B = taken_out or (None, None)
        self.reset_magnitude()

    def prepare_to_read(self) -> None:
        if not starts.needs_only_factors(self.config.init_lora_weights):
            self.reset_parameters()

    @torch.no_grad()
    def reset_magnitude(self) -> None:
        """Start DoRA, where it is used, at the lengths of the rows as they are."""
        if self.magnitude is not None:
            self.magnitude.copy_(self._lengths())

    @property
    def start(self) -> starts.Factors | None:
        """A₀ and B₀ that are taken out of the base, if they are."""
        return None if self.start_A is None else (self.start_A, self.start_B)  # type: ignore[return-value]

    # -- forward ---------------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        return self.r

    def low_rank(self) -> LowRankBranch | None:
        if self.lora_bias is not None or self.config.alora_invocation_tokens is not None:
            return None
        dropout, start = self.dropout if self.training else 0.0, self.start
        if dropout and (start is not None or self.magnitude is not None):
            return None  # part of the change sees the whole input
        a, b = self.own_factors()
        if start is not None:
            a, b = torch.cat([a, start[0]]), torch.cat([b, -start[1]], 1)
        if self.magnitude is None:
            return LowRankBranch(a, b, self.scaling, dropout)
        return None if self.base.bias is not None else LowRankBranch(a, b, self.scaling, gain=self._ratio())

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        dropped = F.dropout(x, self.dropout) if self.dropout and self.training else x
        a, b = self.own_factors()
        h = self.base.apply(dropped, a)  # (..., r): scaling this costs less than scaling the output
        if self.config.alora_invocation_tokens is not None:
            h = h * invocation.mask(self.shared, h)
        h = h.to(y.dtype) * self.scaling
        if self.magnitude is not None:
            return self._dora(x, dropped, h, y)
        y = self.base.add_pointwise(y, h, b)
        if self.lora_bias is not None:
            y = y + self.base.per_output(self.lora_bias * self.scaling).to(y.dtype)
        return y if self.start is None else y - self._taken_out(x, y.dtype)

    def _taken_out(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """s·B₀A₀x."""
        assert self.start is not None
        return self.base.pointwise(self.base.apply(x, self.start[0]).to(dtype) * self.scaling, self.start[1])

    def _dora(self, x: Tensor, dropped: Tensor, h: Tensor, y: Tensor) -> Tensor:
        more = self.base.per_output(self._ratio() - 1).to(y.dtype)  # rounded to 16 bits, a ratio near one is one
        if self.start is not None:
            y = y - self._taken_out(x, y.dtype)
        y = self.base.add_pointwise(y, h, self.lora_B)
        if dropped is not x:
            plain = self.base.apply(dropped, self.base.read_unmerged()).to(y.dtype)
            if self.start is not None:
                plain = plain - self._taken_out(dropped, y.dtype)
            return torch.addcmul(y, self.base.add_pointwise(plain, h, self.lora_B), more)
        bias = self.base.unmerged_bias
        return torch.addcmul(y, y if bias is None else y - self.base.per_output(bias).to(y.dtype), more)

    def _ratio(self) -> Tensor:
        """m/n (o,)."""
        assert self.magnitude is not None
        return self.magnitude / self._lengths().to(self.magnitude).clamp_min(torch.finfo(self.magnitude.dtype).tiny)

    @torch.no_grad()
    def _lengths(self) -> Tensor:
        """N (o,): ‖W + sBA‖ by rows, expanded so that BA is never built; ‖W‖ is kept while W does not change."""
        weight = self.base.read_unmerged() if self.new_base is None else self.new_base
        weight = weight.flatten(1)
        norms = self._square_norms(weight)
        a, b = self.lora_A.flatten(1), self.lora_B.flatten(1) * self.scaling
        if self.start is not None:
            a = torch.cat([a, self.start[0].flatten(1)])
            b = torch.cat([b, self.start[1].flatten(1) * -self.scaling], 1)
        cross = ((weight @ a.to(weight.dtype).T).to(b) * b).sum(1)  # casting W would cost more than the rest
        square = norms.to(a) + 2 * cross + ((b @ (a @ a.T)) * b).sum(1)
        return square.clamp_min(0).sqrt()

    def _square_norms(self, weight: Tensor) -> Tensor:
        """‖W‖² by rows (o,) of the base's weight (o, i·k), which is kept with the weight's version if it has one."""
        version = self.base.unmerged_version() if self.new_base is None else None
        if version is not None and self._row_norms is not None and self._row_norms[0] == version:
            return self._row_norms[1]
        norms = weight.to(self.lora_A).square().sum(1)
        if version is not None:
            self._row_norms = version, norms
        return norms

    # -- merged ----------------------------------------------------------------------------------------------

    def check_mergeable(self) -> None:
        if self.config.alora_invocation_tokens is not None:
            raise MergeError("aLoRA acts at some positions only, so no weight equals it; keep it unmerged")
        if self.groups > 1:
            raise MergeError(
                "LORA on a convolution with groups has no merged weight: A mixes the groups that W keeps apart; "
                "keep the adapter unmerged or exclude this layer"
            )

    def exact_factors(self) -> Factors | None:
        if self.magnitude is not None:
            return None
        a, b = self.own_factors()
        if self.start is not None:
            a, b = torch.cat([a, self.start[0]]), torch.cat([b, -self.start[1]], 1)
        experts = self.base.count
        a = a.reshape(experts, len(a) // experts, -1)
        return Factors(a, b.reshape(len(b), -1, experts).permute(2, 0, 1), self.scaling)

    def delta_weight(self) -> Tensor:
        """s·BA (minus s·B₀A₀), before DoRA's rescaling."""
        return self._product(*self.own_factors()) - (0 if self.start is None else self._product(*self.start))

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        if self.base.kind == "parameter":
            experts = self.base.count
            a, b = a.view(experts, self.r, -1), b.view(b.shape[0], self.r, experts)
            return self.scaling * torch.einsum("ore,eri->eoi", b, a).reshape(self.base.read().shape)
        return self.scaling * (b.flatten(1) @ a.flatten(1)).view(b.shape[0], *a.shape[1:])

    def merged_weight(self, weight: Tensor) -> Tensor:
        if self.base.kind == "linear" and self.start is None:
            a, b = self.own_factors()
            merged = torch.addmm(weight, b.to(weight), a.to(weight), alpha=self.scaling)
        else:
            merged = super().merged_weight(weight)
        if self.magnitude is None:
            return merged
        return merged * self._ratio().to(merged).view(-1, *(1 for _ in merged.shape[1:]))

    def merge_into(self, weight: Tensor) -> Tensor:
        if self.base.kind != "linear" or self.start is not None or self.magnitude is not None:
            return self.merged_weight(weight)
        a, b = self.own_factors()
        return weight.addmm_(b.to(weight), a.to(weight), alpha=self.scaling)

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        own = self.base.unmerged_bias
        if self.magnitude is not None and bias is not None and own is not None and bias is not own:
            return own + (bias - own) * self._ratio().to(bias)  # what adapters below made of it, as in the forward
        if self.lora_bias is None:
            return bias
        if bias is None:
            raise MergeError("lora_bias cannot be merged into a layer that has no bias; keep the adapter unmerged")
        return bias + (self.lora_bias * self.scaling).to(bias)

    # -- disk ------------------------------------------------------------------------------------------------

    def checkpoint_keys(self) -> dict[str, str]:
        weight = "lora_{}.weight" if self.base.kind != "embedding" else "lora_embedding_{}"
        keys = {"lora_A": weight.format("A"), "lora_B": weight.format("B")}
        keys |= {"lora_bias": "lora_B.bias"} if self.lora_bias is not None else {}
        return keys | ({"magnitude": "lora_magnitude_vector"} if self.magnitude is not None else {})

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        if self.source is not None:
            a, b = self.own_factors()
            return {"lora_A.weight": a.detach(), "lora_B.weight": b.detach()}
        tensors = super().checkpoint_tensors()
        if self.magnitude is not None:
            tensors["lora_magnitude_vector"] = self._magnitude_on_disk()
        if self.start is not None:
            a, b = list(tensors)[:2]
            tensors[a] = torch.cat([tensors[a], self.start[0]])
            tensors[b] = torch.cat([tensors[b], -self.start[1]], 1)
        return tensors

    def _magnitude_on_disk(self) -> Tensor:
        assert self.magnitude is not None
        ones = (1 for _ in self.base.kernel)
        return self.magnitude.detach().view(1, -1, *ones) if self.base.kind == "conv" else self.magnitude.detach()

    def fits(self, key: str, tensor: Tensor) -> bool:
        if self.source is not None:
            return super().fits(key, tensor)
        own = dict(zip(self.checkpoint_keys().values(), self.checkpoint_keys(), strict=True))
        if key == "lora_magnitude_vector":
            return super().fits(key, tensor)
        shapes, axis = [tuple(self.get_parameter(own[key]).shape)], 0 if own[key] == "lora_A" else 1
        if self.start is not None or self.config.init_lora_weights in ("corda", "lora_ga"):
            shapes.append((*shapes[0][:axis], 2 * shapes[0][axis], *shapes[0][axis + 1 :]))
        return tuple(tensor.shape) in shapes

    def load_checkpoint_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        if self.source is not None:
            return  # the embedding's tensors are these
        for name, key in self.checkpoint_keys().items():
            parameter, saved = self._parameter(name), tensors[key]
            if name in ("lora_A", "lora_B") and saved.shape != parameter.shape:
                axis, buffer = (0, "start_A") if name == "lora_A" else (1, "start_B")
                saved, taken_out = saved.split(parameter.shape[axis], axis)
                setattr(self, buffer, (taken_out if axis == 0 else -taken_out).to(parameter).contiguous())
            self._put(parameter, saved if saved.shape == parameter.shape else saved.reshape(parameter.shape))

    @classmethod
    def config_to_save(cls, config: LoraConfig, adapters: Mapping[str, Adapter]) -> LoraConfig:
        """Where a start was taken out of the base, the configuration of the plain LoRA of rank 2r that is written."""
        if all(cast(Lora, adapter).start is None for adapter in adapters.values()):
            return config
        wider = math.sqrt(2) if config.use_rslora else 2
        return replace(
            config,
            r=2 * config.r,
            lora_alpha=wider * config.lora_alpha,
            rank_pattern={key: 2 * r for key, r in (config.rank_pattern or {}).items()},
            alpha_pattern={key: wider * alpha for key, alpha in (config.alpha_pattern or {}).items()},
            init_lora_weights=True,
            corda_config=None,
            lora_ga_config=None,
        )

    # -- aLoRA -----------------------------------------------------------------------------------------------

    @classmethod
    def make_shared(cls, config: LoraConfig, bases: Mapping[str, BaseWeight]) -> invocation.Invocation | None:
        return None if config.alora_invocation_tokens is None else invocation.Invocation()

    @classmethod
    def forward_arguments(cls, config: LoraConfig) -> frozenset[str] | None:
        return None if config.alora_invocation_tokens is None else frozenset({"alora_offsets"})

    @classmethod
    def before_forward(
        cls, config: LoraConfig, adapters: Mapping[str, Adapter], model: nn.Module, inputs: dict[str, Any]
    ) -> None:
        assert config.alora_invocation_tokens is not None
        invocation.locate(next(iter(adapters.values())).shared, config.alora_invocation_tokens, inputs)
