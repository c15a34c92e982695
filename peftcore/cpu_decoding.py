"""Faster forwards of transformers' models on CPUs without gradients, by compiled code in place of PyTorch's calls."""

import inspect
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from peftcore.compiled.attention import attention_of_one_token, attention_of_prompts
from peftcore.compiled.norm import rms_norm
from peftcore.compiled.rotary import rotate_positions

ATTENTION = "peftcore_cpu"
"""Name of `_attention` among the attention functions of transformers."""
_ROTARY = "apply_rotary_pos_emb"
"""Name of the function by which the attention layers of transformers rotate queries and keys."""
_PLAIN = "plain_class"
"""Attribute of a class of `_with_compiled_rotary`: the layer's own class."""


class CompiledRMSNorm(nn.Module):
    """A normalisation layer of transformers that computes by `rms_norm` where that fits.

    Args:
        norm: A layer that `_can_replace` accepts; the new one has its parameter.

    Shapes: x (..., d), weight (d,), output like x.
    """

    def __init__(self, norm: Any):
        super().__init__()
        # whatever the forward of its class reads
        self.__dict__.update({name: value for name, value in vars(norm).items() if not name.startswith("_")})
        self.weight: Tensor = norm.weight
        self.variance_epsilon: float = norm.variance_epsilon
        self.replaced = type(norm)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the normalised x."""
        output = rms_norm(hidden_states, self.weight, self.variance_epsilon)
        return self.replaced.forward(self, hidden_states) if output is None else output


def use_compiled_code(model: Any) -> None:
    """Let a model on a CPU compute attention, RMSNorm and rotary position embeddings by compiled code.

    This is for forwards without gradients; their outputs may be rounded in another way. All other forwards are as
    before. Attention is replaced if it is transformers' "sdpa", the other two if their formulas are those of Llama.
    Where nothing can be compiled, only the attention of decoding steps, which have one token in each row, becomes
    faster. Call it before the model gets adapters.

    Args:
        model: A `PreTrainedModel`; on another device it stays as it is.
    """
    if model.device.type != "cpu":
        return
    if model.config._attn_implementation == "sdpa" and model._supports_attention_backend:
        model.set_attn_implementation(ATTENTION)
    modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
    norms = {path: norm for path, norm in modules.items() if path and _can_replace(norm)}
    replaced = {norm: CompiledRMSNorm(norm) for norm in dict.fromkeys(norms.values())}
    for path, norm in norms.items():
        parent, _, name = path.rpartition(".")
        setattr(modules[parent], name, replaced[norm])
    for module in modules.values():
        if (faster := _with_compiled_rotary(type(module))) is not None:
            module.__class__ = faster


@cache
def _with_compiled_rotary(kind: type[nn.Module]) -> type[nn.Module] | None:
    """Return a subclass of a layer of transformers that rotates queries and keys by `rotate_positions` where that fits.

    The subclass has the layer's own forward, in which the name `_ROTARY` stands for `rotate` below; the module of the
    layer's class does not change. None for such a subclass, and for a layer without this function or with another
    formula.
    """
    forward: Any = inspect.unwrap(kind.forward)
    code = getattr(forward, "__code__", None)
    is_candidate = kind.__module__.startswith("transformers.") and not hasattr(kind, _PLAIN)
    if not is_candidate or code is None or _ROTARY not in code.co_names:
        return None
    original = forward.__globals__.get(_ROTARY)
    if original is None or not _is_known_rotation(original):
        return None

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *arguments: Any, **options: Any) -> Any:
        rotated = None if arguments or options else rotate_positions(q, k, cos, sin)
        return original(q, k, cos, sin, *arguments, **options) if rotated is None else rotated

    def reduce(module: Any, protocol: Any) -> Any:
        _, _, *state = nn.Module.__reduce_ex__(module, protocol)
        return _new, (kind,), *state

    names = {**forward.__globals__, _ROTARY: rotate}
    faster = FunctionType(code, names, forward.__name__, forward.__defaults__, forward.__closure__)
    faster.__kwdefaults__ = forward.__kwdefaults__
    # others look up the functions of a layer's module by its name
    members = {"__module__": kind.__module__, "__reduce_ex__": reduce, "forward": faster, _PLAIN: kind}
    return type(kind.__name__, (kind,), members)


def _new(kind: type[nn.Module]) -> nn.Module:
    """Return a layer without attributes, for copies and for what was pickled."""
    made = _with_compiled_rotary(kind) or kind
    return made.__new__(made)


def _is_known_rotation(function: Callable[..., Any]) -> bool:
    """Return True if a function computes what `rotate_positions` does, and that can be computed here."""
    with torch.no_grad():
        q, k, cosines, sines = torch.linspace(-3, 2, 192).view(4, 2, 1, 3, 8).unbind()
        tables = cosines[:, 0], sines[:, 0].contiguous()
        expected = rotate_positions(q, k, *tables)
        try:
            found = function(q, k, *tables)
        except (RuntimeError, TypeError, ValueError, IndexError):  # it takes other arguments or shapes
            return False
        return expected is not None and all(map(torch.allclose, found, expected))


def _can_replace(norm: nn.Module) -> bool:
    """Return True for a layer of transformers without hooks that computes what `rms_norm` does.

    Its forward must take x alone, and be callable with an instance of another class: without `super()`.
    """
    kind = type(norm)
    if not kind.__module__.startswith("transformers.") or not kind.__name__.endswith("RMSNorm"):
        return False
    weight, epsilon = norm._parameters.get("weight"), getattr(norm, "variance_epsilon", None)
    if weight is None or epsilon is None or len(norm._parameters) > 1 or norm._modules or norm._buffers:
        return False
    has_hooks = norm._forward_hooks or norm._forward_pre_hooks or "forward" in norm.__dict__
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    if (
        has_hooks
        or code is None
        or "__class__" in code.co_freevars
        or len(inspect.signature(norm.forward).parameters) > 1
    ):
        return False
    with torch.no_grad():
        x = torch.linspace(-3, 3, weight.numel(), dtype=weight.dtype).view(1, 1, -1)
        output = rms_norm(x, weight, epsilon)
        if output is None:
            return False
        tolerance = 1e-5 if weight.dtype == torch.float32 else 2**-7
        return torch.allclose(norm(x), output, rtol=tolerance, atol=0)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Return what transformers' "sdpa" returns.

    Shapes: query (B, H, T, d), key and value (B, h, S, d), attention_mask (B, 1, T, S), output (B, T, H, d).
    """
    is_plain = not (options.get("dropout") or options.get("softcap") or options.get("position_bias") is not None)
    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    if query.shape[2] > 1 and is_plain:
        own = options.get("is_causal")
        is_causal = attention_mask is None and (getattr(module, "is_causal", True) if own is None else own)
        output = attention_of_prompts(query, key, value, attention_mask, is_causal, scaling)
        if output is not None:
            return output, None
    elif is_plain:
        output = attention_of_one_token(query, key, value, attention_mask, scaling)
        if output is not None:
            return output, None
        if attention_mask is None:
            # with a mask, even one that hides nothing, transformers computes all query heads of one key head together;
            # without, PyTorch does so (`enable_gqa`), and takes several times as long (LOG.md of the benchmarks)
            attention_mask = torch.ones(1, 1, 1, key.shape[2], dtype=torch.bool, device=key.device)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
