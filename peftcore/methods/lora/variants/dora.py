"""DoRA: W' = m/n·(W + s·BA), n the length of each output row of W + s·BA, without gradient. arXiv:2402.09353.

m starts at n, so training begins at the base's own output. The forward pass adds (m/n − 1) times the output without
bias. On a convolution with groups, n is computed as in HF PEFT: its product of A and B is reshaped to W.
Shapes: i in_features, o out_features, r rank, k kernel; m, n (o,), A (r, i, *k), B (o, r, *1).
"""

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from peftcore._util.fingerprint import Fingerprint
from peftcore.bases.base import WeightVersion
from peftcore.bases.plain import current_parameter
from peftcore.compiled.checksum import checksum
from peftcore.kernels.factors import Factors
from peftcore.kernels.low_rank import LowRankBranch
from peftcore.methods.lora.variant import Variant, register_variant

if TYPE_CHECKING:
    from peftcore.methods.lora.adapter import Lora

_ROW_NORMS = "_dora_row_norms"
"""Attribute of the adapter: (version of the base weight, ‖W‖² by rows (o,))."""
_MAGNITUDE = "lora_magnitude_vector_weight"
_RATIO = "_dora_ratio"
"""Attribute of the adapter: its `_KnownRatio`."""


class _KnownRatio(NamedTuple):
    """m/n, and the state for which it is right."""

    value: Tensor
    """m/n (o,)."""
    base: WeightVersion
    changes: object
    """`lora.changes`."""
    weights: int | Fingerprint
    """`_state_of_weights`."""

    def holds(self, lora: "Lora") -> bool:
        """Return True if no weight has changed."""
        if lora.changes != self.changes or not lora.base.has_unmerged_version(self.base):
            return False
        weights = self.weights
        return weights.holds() if isinstance(weights, Fingerprint) else weights == _checksum(lora)


@register_variant
class Dora(Variant):
    """Variant for `use_dora=True`: each output row of W + s·BA is rescaled to a trained length m."""

    option = "use_dora"
    layer_kinds = frozenset({"linear", "conv", "embedding"})
    excludes: ClassVar = {
        "lora_bias": "DoRA rescales rows of W, and a bias is not in them",
        "alora_invocation_tokens": "DoRA changes every position, aLoRA only some",
        "target_parameters": "raw parameters take plain LoRA only",
    }
    keys: ClassVar = {"lora_magnitude_vector_weight": "lora_magnitude_vector"}
    stands_alone = True
    is_gain = True
    is_additive = False
    beyond_low_rank = (
        "DoRA is not low-rank; convert it by add_as_lora(model, name, new_name, rank=...) and export "
        "that, or merge it into the base"
    )

    def add_parameters(self, lora: "Lora") -> None:
        lora.lora_magnitude_vector_weight = nn.Parameter(torch.empty(lora.base.out_features))

    def reset_parameters(self, lora: "Lora") -> None:
        offloads = lora.config.runtime_config.ephemeral_gpu_offload and torch.cuda.is_available()
        on_cpu = lora.base.device.type == "cpu"
        _magnitude(lora).copy_(row_lengths(lora, torch.device("cuda") if offloads and on_cpu else None))

    def low_rank(self, lora: "Lora", branch: LowRankBranch) -> LowRankBranch | None:
        if branch.dropout or lora.base.bias is not None:  # with dropout, part of the change sees the whole input
            return None
        return branch._replace(gain=_ratio(lora) if torch.is_grad_enabled() else _cached_ratio(lora))

    def output_gain(self, lora: "Lora") -> Tensor | None:
        base, known = lora.base, vars(lora).get(_RATIO)
        if known is not None and base.layer._parameters.get("bias") is None and known.holds(lora):
            return known.value  # a base with a bias, which takes longer to read, has no known ratio
        return _cached_ratio(lora) if base.bias is None else None

    def output(self, lora: "Lora", y: Tensor, x: Tensor, dropped: Tensor, h: Tensor) -> Tensor:
        base = lora.base
        more = base.per_output(_ratio(lora) - 1).to(y.dtype)  # minus one before the cast: 16 bits would round it away
        if dropped is not x:
            without_bias = base.apply(dropped, base.read_unmerged()).to(y.dtype)
            if lora.start is not None:
                without_bias = without_bias - lora.start_output(dropped, y.dtype)
            return torch.addcmul(y, base.add_pointwise(without_bias, h, lora.own_factors()[1]), more)
        bias = base.unmerged_bias
        return torch.addcmul(y, y if bias is None else y - base.per_output(bias).to(y.dtype), more)

    def exact_factors(self, lora: "Lora", factors: Factors) -> None:
        return None

    def merged_weight(self, lora: "Lora", weight: Tensor) -> Tensor:
        return weight * _ratio(lora).to(weight).view(-1, *(1 for _ in weight.shape[1:]))

    def merged_bias(self, lora: "Lora", bias: Tensor | None) -> Tensor | None:
        own = lora.base.unmerged_bias
        if bias is None or own is None or bias is own:
            return bias
        return own + (bias - own) * _ratio(lora).to(bias)  # changes by the adapters below, as in the forward pass

    def checkpoint_tensors(self, lora: "Lora") -> dict[str, Tensor]:
        magnitude = _magnitude(lora).detach()
        if lora.base.kind == "conv":
            magnitude = magnitude.view(1, -1, *(1 for _ in lora.base.kernel))
        return {"lora_magnitude_vector": magnitude}


def _magnitude(lora: "Lora") -> Tensor:
    magnitude = current_parameter(lora, "lora_magnitude_vector_weight")
    assert magnitude is not None
    return magnitude


def _ratio(lora: "Lora") -> Tensor:
    """Return m/n (o,)."""
    magnitude = _magnitude(lora)
    return magnitude / row_lengths(lora).to(magnitude).clamp_min(torch.finfo(magnitude.dtype).tiny)


def _cached_ratio(lora: "Lora") -> Tensor:
    """Return m/n (o,) for a forward without gradients, from the last one if no weight has changed since.

    n takes as long as a product with W.
    """
    known: _KnownRatio | None = vars(lora).get(_RATIO)
    if known is not None and known.holds(lora):
        return known.value
    base, changes, weights = lora.base.unmerged_version(), lora.changes, _state_of_weights(lora)
    ratio = _ratio(lora)
    if base is not None and weights is not None:
        vars(lora)[_RATIO] = _KnownRatio(ratio, base, changes, weights)
    return ratio


def _state_of_weights(lora: "Lora") -> int | Fingerprint | None:
    """Return the checksum of A, B and m; where there is none, a fingerprint; None if changes cannot be noticed."""
    has_own = len(lora.variants) == 1 and lora.computes_with_parameters()
    if has_own and (found := _checksum(lora)) is not None:
        return found
    fingerprint = Fingerprint([lora])
    return fingerprint if fingerprint.countable else None


def _checksum(lora: "Lora") -> int | None:
    own: Any = lora._parameters
    return checksum(own.get("lora_A_weight"), own.get("lora_B_weight"), own.get(_MAGNITUDE))


@torch.no_grad()
def row_lengths(lora: "Lora", device: torch.device | None = None) -> Tensor:
    """Return n (o,): ‖W + sBA‖ by rows, expanded so that BA is never built; ‖W‖ is cached while W does not change.

    Args:
        lora: the layer's adapter.
        device: where to compute; None for the device of the layer.
    """
    weight = lora.base.read_unmerged() if lora.new_base is None else lora.new_base
    if lora.groups > 1:
        return _grouped_row_lengths(lora, weight if device is None else weight.to(device))
    a, b = lora.own_factors()
    a, b = a.flatten(1), b.flatten(1) * lora.scaling
    if lora.start is not None:
        a = torch.cat([a, lora.start[0].flatten(1)])
        b = torch.cat([b, lora.start[1].flatten(1) * -lora.scaling], 1)
    if device is not None:
        weight, a, b = weight.to(device), a.to(device), b.to(device)
    weight = weight.flatten(1)
    norms = _square_norms(lora, weight)
    cross = ((weight @ a.to(weight.dtype).T).to(b) * b).sum(1)  # casting W would cost more than the rest
    square = norms.to(a) + 2 * cross + ((b @ (a @ a.T)) * b).sum(1)
    return square.clamp_min(0).sqrt()


def _grouped_row_lengths(lora: "Lora", weight: Tensor) -> Tensor:
    """Return n (o,) of a convolution with g groups, as HF PEFT defines it.

    W is (o, i/g, *k), and BA as the layer applies it is (o, i, *k). HF PEFT reads B (o, r/g) as (o/g, r), multiplies
    it by A (r, i·k), and reads the product as (o, i/g, *k). An adapter's file has a meaning only with these n.
    """
    a, b = lora.own_factors()
    if lora.start is not None:
        a, b = torch.cat([a, lora.start[0]]), torch.cat([b, -lora.start[1]], 1)
    change = (lora.scaling * b.reshape(-1, len(a)) @ a.flatten(1)).to(weight.device)
    return (weight.to(change).flatten(1) + change.reshape(len(weight), -1)).square().sum(1).sqrt()


def _square_norms(lora: "Lora", weight: Tensor) -> Tensor:
    """Return ‖W‖² by rows (o,) of the base's weight (o, i·k), cached with the weight's version if it has one."""
    version: WeightVersion | None = lora.base.unmerged_version() if lora.new_base is None else None
    cached = vars(lora).get(_ROW_NORMS)
    if version is not None and cached is not None and cached[0] == version:
        return cached[1]
    # the root of the rounded square is the length itself, so m/n is exactly 1 at the start
    norms = torch.linalg.vector_norm(weight.to(_magnitude(lora).dtype), dim=1).square()
    if version is not None:
        vars(lora)[_ROW_NORMS] = version, norms.to(_magnitude(lora).device)
    return norms
