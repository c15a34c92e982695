"""A causal model's forward whose output head sees the supervised rows alone, by a hook that stands for one forward.

The hook sees the hidden states before the head and takes one of three ways:

- a plain linear head: the losses are computed right there (so that gathered weights are there too), chunk by chunk
  and without logits; the head then runs on no row at all, so that the model's own code behind it still works;
- any other head (adapted, quantised): it gets the n rows, and the model's code makes its n logits of them;
- a model whose head is not named, not called once, or does not take rows alone: all logits, of which n are taken.

What the model does behind its head is never taken on trust: before the first batch, a few of its rows, of growing size,
go through head and model, and the first way is taken only if `LogitTransform` says the same logits.

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

from peftcore._util.tensors import is_sharded
from peftcore.detection.head import LogitTransform, logit_transforms, output_head
from peftcore.errors import PeftError
from peftcore.train.head_hooks import HeadResult, HeadRows, flat_indices

_LOG = logging.getLogger(__name__)

_TELLING = 10.0
"""Size of a product below which a soft-cap is not told from none in bfloat16."""


def supervised_logits(model: nn.Module, inputs: Mapping[str, Any], mask: Tensor) -> Tensor:
    """Logits (n, V) at the true positions of `mask` (B, T), row by row, in the model's dtype.

    inputs: the forward's keyword arguments, without labels. The head runs at those positions alone if it can.
    TrainingError where the model gives logits of fewer than T positions.
    """
    logits = _forward(model, inputs, mask, None).logits
    assert logits is not None  # losses are computed only for targets
    return logits


def supervised_losses(model: nn.Module, inputs: Mapping[str, Any], mask: Tensor, targets: Tensor) -> Tensor:
    """Negative log likelihood (n,), in nats, float32 or wider, of `targets` (n,) at the true positions of `mask`."""
    found = _forward(model, inputs, mask, targets)
    if found.losses is not None:
        return found.losses
    assert found.logits is not None
    logits = found.logits.to(torch.promote_types(found.logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets.to(logits.device), reduction="none")


def is_compiled(model: nn.Module) -> bool:
    """Whether the whole model, under or over what data parallelism wraps around it, is compiled: no place for hooks."""
    wrapped: Any = model
    while isinstance(wrapped, nn.Module):
        if is_compiled_module(wrapped) or wrapped._compiled_call_impl is not None:
            return True
        wrapped = getattr(wrapped, "module", None)
    return torch.compiler.is_compiling()


@dataclass(frozen=True)
class _Tail:
    """What a model does behind its head."""

    transform: LogitTransform | None
    """None: something else."""
    takes_rows: bool
    """Whether its code takes the product of any rows."""


_ALL_LOGITS = _Tail(None, takes_rows=False)
_TAILS: WeakKeyDictionary[nn.Module, dict[Any, _Tail]] = WeakKeyDictionary()


def _forward(model: nn.Module, inputs: Mapping[str, Any], mask: Tensor, targets: Tensor | None) -> HeadResult:
    bare = getattr(model, "module", model)
    # of a sharded model every forward pass gathers, and only processes with labels would make that of the first batch
    sharded = any(is_sharded(parameter) for parameter in bare.parameters())
    head = None if sharded or is_compiled(model) else output_head(bare)
    if head is None or inputs.get("past_key_values") is not None:  # a cache would not stand a second forward
        return _all_logits(model, inputs, mask)
    transforms = logit_transforms(bare)
    # post-processing may differ between training and evaluation, and a change of class is another forward
    key = (type(bare), bare.training, transforms)
    tails = _TAILS.setdefault(bare, {})
    tail = tails.get(key)
    if tail is None and mask.any():
        tail = _tail_of(model, inputs, head, mask, transforms)
    known = tail or _ALL_LOGITS
    found = _known_forward(model, inputs, HeadRows(head, mask, targets, known.transform), known)
    if tail is not None:  # only now: a batch that is faulty itself says nothing of the model
        tails[key] = tail
    return found


def _known_forward(model: nn.Module, inputs: Mapping[str, Any], rows: HeadRows, tail: _Tail) -> HeadResult:
    found = rows.found(rows.run(model, inputs)) if tail.takes_rows else None
    return _all_logits(model, inputs, rows.mask) if found is None else found


def _all_logits(model: nn.Module, inputs: Mapping[str, Any], mask: Tensor) -> HeadResult:
    logits = model(**inputs).logits
    return HeadResult(logits=logits.flatten(0, 1)[flat_indices(mask, logits)])


# -- the first batch -------------------------------------------------------------------------------------------


def _tail_of(
    model: nn.Module, inputs: Mapping[str, Any], head: nn.Module, mask: Tensor, transforms: tuple[LogitTransform, ...]
) -> _Tail | None:
    """What the model does behind its head, by one forward of its own; None: not to be told from this batch.

    It is without gradients, because rows that are large enough to tell overflow in float16: a weight's gradient would
    be zero times infinity.
    """
    bare = getattr(model, "module", model)
    name = type(bare).__name__
    rows = HeadRows(head, mask, None, None, probes=True)
    random = _random_state(mask.device)
    try:
        with torch.no_grad():
            output = rows.run(model, inputs)
    except (PeftError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        # An error of the batch itself comes again from the second forward, which changes nothing.
        _LOG.info("%s does not take rows of hidden states alone (%s); all its logits are computed", name, error)
        return _ALL_LOGITS
    finally:
        _restore(random, mask.device)
    if rows.found(output) is None or rows.product is None:
        _LOG.info("%s does not compute its logits by one call of its output head; all are computed", name)
        return _ALL_LOGITS
    keeps_rows = "logits_to_keep" in inspect.signature(bare.forward).parameters  # its own code drops rows as well
    product, logits = rows.product, output.logits[0]
    if not bool((product[product.isfinite()].abs() >= _TELLING).any()):
        return None
    transform = next((t for t in transforms if t.explains(product, logits)), None)
    if transform is None:
        ways = "its output head runs at labelled tokens" if keeps_rows else "all its logits are computed"
        _LOG.info("%s does something unknown to its logits; %s", name, ways)
    return _Tail(transform, transform is not None or keeps_rows)


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state())
    return states


def _restore(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1])
