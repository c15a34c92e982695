"""The output head of a model: its layers, and the transform from the head's product to logits, z = f(s (h Wᵀ + b)).

transformers' models scale the logits (Cohere multiplies, Granite divides), soft-cap them at ±c (Gemma), or do both. The
configuration fields have several names, and one name has two meanings: Granite divides by `logits_scaling`, HyperCLOVA
X multiplies by it. So the configuration gives candidates, and the caller compares them with the model's logits.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftcore.detection.module_tree import ModuleTree, is_below
from peftcore.detection.trunk import text_config, vocab_size

_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling",)
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Configuration fields for s, 1/s and c. Some models exchange s and 1/s, which is tried second."""


@dataclass(frozen=True)
class LogitTransform:
    """The map from the head's product to logits: u = scale · product, then softcap · tanh(u / softcap)."""

    scale: float = 1.0
    softcap: float | None = None
    """None: no soft-capping."""

    def __call__(self, product: Tensor) -> Tensor:
        """Return the logits of the head's product, both (..., V)."""
        logits = product if self.scale == 1 else product * self.scale
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap

    def explains(self, product: Tensor, logits: Tensor) -> bool:
        """Return True if this transform maps `product` to `logits`, both (n, V), up to rounding."""
        if product.shape != logits.shape:
            return False
        coarse = max(torch.finfo(product.dtype).eps, torch.finfo(logits.dtype).eps)
        # a half-precision product may be widened first, or each operation may round again
        tolerance = coarse if coarse > 1e-6 else 8 * coarse
        wide = torch.promote_types(product.dtype, torch.float32)
        return any(
            torch.allclose(self(value).to(logits.dtype), logits, rtol=tolerance, atol=tolerance / 64, equal_nan=True)
            for value in (product, product.to(wide))
        )


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the module that `get_output_embeddings` names; None if the model names none."""
    get = getattr(model, "get_output_embeddings", None)
    if get is None:
        return None
    try:
        head = get()
    except (AttributeError, NotImplementedError):
        return None
    return head if isinstance(head, nn.Module) else None


def logit_transforms(model: nn.Module) -> tuple[LogitTransform, ...]:
    """Return the candidate transforms that fit the model's configuration, the likeliest first."""
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
    values = (getattr(config, name, None) for config in configs for name in names)
    return [value for value in values if isinstance(value, int | float) and not isinstance(value, bool) and value > 0]


_INPUT_LAYERS = {"pi0": ("in_proj", "state_proj", "mlp_in", "mlp_out")}
"""{family: name suffixes} of layers outside the base model that compute its input, as π0 embeds states and actions."""


def head_paths(model: nn.Module, tree: ModuleTree) -> list[str]:
    """Return the paths of the layers that compute the model's result.

    These are the output embeddings, or else the task layers outside of the base model. In a module that is not a
    transformers model, they are the layers with one output per vocabulary entry, or else the last top-level layer after
    the blocks. A module without repeated blocks has no recognisable head.

    Args:
        model: The model.
        tree: Its module tree.
    """
    outside = [layer for layer in tree.linears() if tree.block_of(layer.path) is None]
    head = output_head(model)
    heads = [layer.path for layer in outside if head is not None and head in (layer.module, _at(model, layer.path))]
    if heads:
        return heads
    prefix = getattr(model, "base_model_prefix", "")
    if prefix in tree.modules and prefix:
        feeding = _INPUT_LAYERS.get(str(getattr(getattr(model, "config", None), "model_type", "")), ())
        return [s.path for s in outside if not is_below(s.path, prefix) and not s.path.endswith(tuple(feeding))]
    if prefix:  # a task class with the parts of its base model at top level
        labels = getattr(getattr(model, "config", None), "num_labels", None)
        return [layer.path for layer in outside[-1:] if layer.out_features == labels and "." not in layer.path]
    if not tree.blocks:
        return []
    vocabulary = vocab_size(model, tree)
    per_token = [layer.path for layer in outside if layer.out_features == vocabulary]
    order = list(tree.modules)
    last_block = max(order.index(block) for block in tree.blocks)
    after = [layer.path for layer in outside if "." not in layer.path and order.index(layer.path) > last_block]
    return per_token or after[-1:]


def _at(model: nn.Module, path: str) -> nn.Module | None:
    """Return the module at a path, which may be an adapter layer; None if there is none."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None
