"""What a causal language model does between its output head's product and its logits: z = f(s (h Wᵀ + b)).

transformers' models multiply the logits (Cohere), divide them (Granite), soft-cap them at ±c (Gemma), or both; the
fields of the configuration that say so have a handful of names, of which one even means both directions (Granite
divides by `logits_scaling`, HyperCLOVA X multiplies by it). So the fields give candidates, and logits decide.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftcore.detection.trunk import text_config

_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling",)
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Where configurations keep s, 1/s and c. Each may be used the other way round; these ways are tried first."""


@dataclass(frozen=True)
class LogitTransform:
    """f(u) = softcap tanh(u / softcap), or u, of u = scale · product."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, product: Tensor) -> Tensor:
        logits = product if self.scale == 1 else product * self.scale
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap

    def explains(self, product: Tensor, logits: Tensor) -> bool:
        """Whether the model made `logits` of `product` (both (n, V)) so, within the rounding of their dtype."""
        if product.shape != logits.shape:
            return False
        coarse = max(torch.finfo(product.dtype).eps, torch.finfo(logits.dtype).eps)
        # a product in half precision may be widened first, or each operation round once more
        tolerance = coarse if coarse > 1e-6 else 8 * coarse
        wide = torch.promote_types(product.dtype, torch.float32)
        return any(
            torch.allclose(self(given).to(logits.dtype), logits, rtol=tolerance, atol=tolerance / 64, equal_nan=True)
            for given in (product, product.to(wide))
        )


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that turns hidden states into logits, as the model names it; None where it names none."""
    get = getattr(model, "get_output_embeddings", None)
    if get is None:
        return None
    try:
        head = get()
    except (AttributeError, NotImplementedError):
        return None
    return head if isinstance(head, nn.Module) else None


def logit_transforms(model: nn.Module) -> tuple[LogitTransform, ...]:
    """What the model may do to its head's product, by its configuration; the likeliest first."""
    scales = dict.fromkeys((*_scales(model), 1.0))
    caps = dict.fromkeys((*(float(cap) for cap in _values(model, _SOFTCAPS)), None))
    return tuple(LogitTransform(scale, cap) for cap in caps for scale in scales)


def _scales(model: nn.Module) -> Iterator[float]:
    multipliers, divisors = _values(model, _MULTIPLIERS), _values(model, _DIVISORS)
    yield from multipliers
    yield from (1 / divisor for divisor in divisors)
    yield from (1 / multiplier for multiplier in multipliers)
    yield from divisors


def _values(model: nn.Module, names: tuple[str, ...]) -> list[float]:
    configs = (text_config(model), getattr(model, "config", None))
    found = (getattr(config, name, None) for config in configs for name in names)
    return [value for value in found if isinstance(value, int | float) and not isinstance(value, bool) and value > 0]
