"""Forward of a causal model whose output head runs at supervised positions only.

Hooks on the head (`head_hooks.py`) take one of three ways:

- plain linear head: the hook computes the losses from the head's weight, chunk by chunk and without keeping logits. The
  head then runs on zero rows, so that the model's code after the head still works;
- any other head (adapted, quantised): the head gets the n supervised rows, and the model computes n logits;
- a model whose head has no name, is not called exactly once, or does not accept rows alone: all logits are computed,
  and n of them are selected.

The first way needs the model's processing of the logits (scale, soft-cap). Before the first batch, probes go through
head and model, and the first way is taken only if a `LogitTransform` predicts the probes' logits.

Shapes: B rows of text, T positions, P virtual tokens before them, d hidden width, V vocabulary, n supervised tokens.
"""

import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import is_compiled_module
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.detection.head import LogitTransform, logit_transforms, output_head
from peftcore.errors import PeftError, TrainingError
from peftcore.files.tensors import is_sharded
from peftcore.train.head_hooks import HeadHooks, HeadResult, flat_indices

_LOG = logging.getLogger(__name__)

_LEAST_PROBE_LOGIT = 10.0
"""Least size of a logit at which bfloat16 shows a soft-cap."""


def supervised_logits(model: nn.Module, inputs: Mapping[str, Any], mask: Tensor) -> Tensor:
    """Return the logits (n, V) at the true positions of a mask, row by row, in the model's dtype.

    The head runs at those positions only, if the model allows.

    Args:
        model: A causal language model.
        inputs: Keyword arguments of the forward, without labels.
        mask: (B, T), true at n positions.

    Raises:
        TrainingError: The model returns logits of fewer than T positions, or its use of its head changes while the
            inputs have a cache.
    """
    logits = _forward(model, inputs, mask, None).logits
    assert logits is not None  # without targets there are no losses
    return logits


def supervised_losses(model: nn.Module, inputs: Mapping[str, Any], mask: Tensor, targets: Tensor) -> Tensor:
    """Return the negative log likelihood (n,), in nats, of `targets` (n,) at the true positions of `mask` (B, T)."""
    result = _forward(model, inputs, mask, targets)
    if result.losses is not None:
        return result.losses
    assert result.logits is not None
    logits = result.logits.to(torch.promote_types(result.logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets.to(logits.device), reduction="none")


def is_compiled(model: nn.Module) -> bool:
    """Return True if the whole model or a wrapper around it is compiled; hooks on the head would not run."""
    wrapped: Any = model
    while isinstance(wrapped, nn.Module):
        if is_compiled_module(wrapped) or wrapped._compiled_call_impl is not None:
            return True
        wrapped = getattr(wrapped, "module", None)
    return torch.compiler.is_compiling()


@dataclass(frozen=True)
class _AfterHead:
    """Behaviour of a model after its output head."""

    transform: LogitTransform | None
    """Processing of the logits. None: unknown."""
    takes_rows: bool
    """True if the model's code accepts logits of any number of rows."""


_ALL_LOGITS = _AfterHead(None, takes_rows=False)
_OF_ROWS = {"input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "labels", "adapter_names"}
"""Arguments of a model whose first dimension is the batch's rows."""
_CACHES = ("cache", "past_key_values")
"""Names of the cache argument: in transformers 5.24 and later, and before."""
_PROBED_ROWS = 3
"""Rows of the forward with probes. They do not divide the number of probes, so that code that folds logits into rows of
text fails."""
_AFTER_HEADS: WeakKeyDictionary[nn.Module, dict[Any, _AfterHead]] = WeakKeyDictionary()


def _forward(model: nn.Module, inputs: Mapping[str, Any], mask: Tensor, targets: Tensor | None) -> HeadResult:
    bare = getattr(model, "module", model)
    # a sharded model's forward is collective, but only processes with labels would send probes
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    sharded = distributed and any(is_sharded(parameter) for parameter in bare.parameters())
    head = None if sharded or is_compiled(model) else output_head(bare)
    if head is None:
        return _all_logits(model, inputs, mask)
    transforms = logit_transforms(bare)
    # processing may differ between training and evaluation, and between classes
    key = (type(bare), bare.training, transforms)
    behaviours = _AFTER_HEADS.setdefault(bare, {})
    after_head = behaviours.get(key)
    has_cache = any(inputs.get(name) is not None for name in _CACHES)
    if after_head is None and mask.any():
        # the forward with probes must not extend the cache
        probed = {name: value for name, value in inputs.items() if name not in _CACHES}
        after_head = _find_after_head(model, probed, head, mask, transforms)
        if has_cache and after_head is _ALL_LOGITS:  # perhaps only because the inputs lack their cache
            after_head = None
    known = after_head or _ALL_LOGITS
    result = _known_forward(model, inputs, HeadHooks(head, mask, targets, known.transform), known, has_cache)
    if after_head is not None:  # only after success: an invalid batch says nothing about the model
        behaviours[key] = after_head
    return result


def _known_forward(
    model: nn.Module, inputs: Mapping[str, Any], hooks: HeadHooks, after_head: _AfterHead, has_cache: bool
) -> HeadResult:
    if not after_head.takes_rows:
        return _all_logits(model, inputs, hooks.mask)
    result = hooks.result(hooks.run(model, inputs))
    if result is None and has_cache:
        raise TrainingError(
            f"{type(model).__name__} calls its output head otherwise than in its first batch, and the cache has this "
            "batch already; give no cache"
        )
    return _all_logits(model, inputs, hooks.mask) if result is None else result


def _all_logits(model: nn.Module, inputs: Mapping[str, Any], mask: Tensor) -> HeadResult:
    logits = model(**inputs).logits
    return HeadResult(logits=logits.flatten(0, 1)[flat_indices(mask, logits)])


# -- the first batch -------------------------------------------------------------------------------------------


def _find_after_head(
    model: nn.Module, inputs: Mapping[str, Any], head: nn.Module, mask: Tensor, transforms: tuple[LogitTransform, ...]
) -> _AfterHead | None:
    """Return the model's behaviour after its head, found by one forward with probes. None: the batch does not show it.

    The forward has no gradients: large probes overflow in float16, so a weight's gradient would be 0 · ∞.
    """
    bare = getattr(model, "module", model)
    name = type(bare).__name__
    inputs, mask = _few_rows(inputs, mask)
    hooks = HeadHooks(head, mask, None, None, probes=True)
    random = _random_state(mask.device)
    try:
        with torch.no_grad():
            output = hooks.run(model, inputs)
    except (PeftError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        # If the batch itself is invalid, the second forward raises the same error.
        _LOG.info("%s does not accept single rows of hidden states (%s); all logits are computed", name, error)
        return _ALL_LOGITS
    finally:
        _restore(random, mask.device)
    if hooks.result(output) is None or hooks.product is None:
        _LOG.info("%s does not compute its logits by one call of its output head; all logits are computed", name)
        return _ALL_LOGITS
    # with this argument the model's code can itself drop positions
    keeps_rows = "logits_to_keep" in inspect.signature(bare.forward).parameters
    product, logits = hooks.product, output.logits[0]
    if not bool((product[product.isfinite()].abs() >= _LEAST_PROBE_LOGIT).any()):
        return None
    transform = next((t for t in transforms if t.explains(product, logits)), None)
    if transform is None:
        consequence = "its output head runs at supervised positions" if keeps_rows else "all logits are computed"
        _LOG.info("%s processes its logits in an unknown way; %s", name, consequence)
    return _AfterHead(transform, transform is not None or keeps_rows)


def _few_rows(inputs: Mapping[str, Any], mask: Tensor) -> tuple[Mapping[str, Any], Tensor]:
    """Return the batch's rows with most supervised tokens; the whole batch if not every input is known to have rows."""
    given = {name: value for name, value in inputs.items() if value is not None}
    of_rows = all(isinstance(value, Tensor | list) and len(value) == len(mask) for value in given.values())
    if not of_rows or not given.keys() <= _OF_ROWS or len(mask) <= _PROBED_ROWS:
        return inputs, mask
    rows = mask.sum(1).topk(_PROBED_ROWS).indices.tolist()
    chosen = {
        name: value[rows] if isinstance(value, Tensor) else [value[row] for row in rows]
        for name, value in given.items()
    }
    return chosen, mask[rows]


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state())
    return states


def _restore(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1])
