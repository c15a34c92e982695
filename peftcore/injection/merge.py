"""Folding adapters into base weights and taking them out again, exact to the bit.

The base's own parameters are set aside while a merged one stands in their place, so unmerging puts back the very
tensors; the price is one more copy of each merged weight in memory until then. `merge_and_unload` keeps none.
"""

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight
from peftcore.errors import MergeError, RoutingError
from peftcore.injection.adapter_set import AdapterSet, adapter_set
from peftcore.injection.inject import remove_hosts
from peftcore.layers.adapter_slot import AdapterSlot, with_trained_biases

logger = logging.getLogger(__name__)
_LOCK = threading.Lock()
"""Held while merged weights and the base's own change module_index."""


class _Folding(NamedTuple):
    """Adapters that are to be folded into one base weight."""

    path: str
    slot: AdapterSlot
    base: BaseWeight
    adapters: dict[str, Adapter]


@torch.no_grad()
def merge_adapter(
    model: nn.Module,
    adapter_names: str | list[str] | None = None,
    safe_merge: bool = False,
    progressbar: bool = False,
) -> None:
    """Fold adapters into their base weights, in place; the other active ones go on acting.

    Modules that an adapter trains whole act while it is active, merged or not, as in PEFT.

    adapter_names: in order; None means the active ones.
    safe_merge: check each merged weight for NaN/Inf before writing any. progressbar: show one, layer by layer.
    Raises MergeError if a layer cannot be merged or a merged weight is not finite; nothing is then changed.
    """
    adapters = adapter_set(model)
    if adapters.selection.switched_off:
        raise MergeError("the adapters are disabled, and merged ones would act; call enable_adapters first")
    route = adapters.selection.route
    if adapters.unmerged_by or (route is not None and route.is_final):
        raise MergeError("merge_adapter inside of disable_adapter(), where the model is its base; leave it first")
    chosen = adapters.selection.active if adapter_names is None else adapter_names
    names = [chosen] if isinstance(chosen, str) else list(chosen)
    adapters.require(*names)
    foldings = _checked_foldings(adapters, names, check_values=safe_merge)
    _fold(foldings, progressbar)
    folded = (name for folding in foldings for name in folding.adapters)
    adapters.merged = tuple(dict.fromkeys((*adapters.merged, *folded)))


def check_mergeable(model: nn.Module, adapter_names: list[str]) -> None:
    """Raise MergeError if an adapter cannot be merged, without computing any weight."""
    _checked_foldings(adapter_set(model), adapter_names, check_values=False)


def _checked_foldings(adapters: AdapterSet, names: list[str], check_values: bool) -> list[_Folding]:
    if prompts := [name for name in names if name in adapters.prompts]:
        raise MergeError(
            f"{prompts} are prompts, which no weight can hold; nothing was merged: name the others in adapter_names"
        )
    foldings = []
    for path, slot in adapters.layers.items():
        adapters_here = slot.adapters
        new = {name: adapters_here[name] for name in names if name in adapters_here and name not in slot.merged}
        if new:
            foldings.append(_Folding(path, slot, slot.base, new))
    for folding in foldings:
        _check(folding)
        if check_values:
            _check_values(folding)
    return foldings


def _check(folding: _Folding) -> None:
    bias = folding.base.bias
    for adapter in with_trained_biases(folding.adapters.values()):
        try:
            adapter.check_mergeable()
            adapter.merged_bias(bias)
        except MergeError as error:
            raise MergeError(f"{folding.path}: {error}") from error


def _check_values(folding: _Folding) -> None:
    if _stays_finite(folding):
        return
    items = list(folding.adapters.items())
    firsts = (items[: count + 1] for count in range(len(items)))
    name = next(first[-1][0] for first in firsts if not _stays_finite(folding._replace(adapters=dict(first))))
    raise MergeError(
        f"merging {name!r} into {folding.path} gives NaN or Inf in {folding.base.dtype}, so nothing was merged; if the "
        "adapter is broken, train it again at a lower learning rate or load an earlier checkpoint"
    )


def _stays_finite(folding: _Folding) -> bool:
    """Whether what a merge would write is finite in the type that the base keeps: float16 ends at 65504."""
    weight, bias = _merged(folding)
    finite = bool(weight.to(folding.base.dtype).isfinite().all())
    return finite and (bias is None or bool(bias.to(folding.base.bias).isfinite().all()))


def _merged(folding: _Folding, scratch: dict[Any, Tensor] | None = None) -> tuple[Tensor, Tensor | None]:
    """The weight and bias with the adapters in them.

    scratch: memory that one merge's layers of one shape share; the weight may lie there.
    """
    read, bias = folding.base.read(), folding.base.bias
    wide = torch.promote_types(read.dtype, torch.float32)  # half would round after every adapter
    own = scratch is not None and read.dtype != wide and not folding.base.quantized
    weight = _copied(read, wide, scratch) if own and scratch is not None else read.to(wide)
    for adapter in with_trained_biases(folding.adapters.values()):
        weight = adapter.merge_into(weight) if own else adapter.merged_weight(weight)
        bias = adapter.merged_bias(bias)
    return weight, bias


def _copied(weight: Tensor, dtype: torch.dtype, scratch: dict[Any, Tensor]) -> Tensor:
    """In memory that is used again: fresh pages cost several times what the arithmetic does."""
    key = (weight.shape, weight.device)
    if key not in scratch:
        scratch[key] = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    return scratch[key].copy_(weight)


def _fold(foldings: list[_Folding], progressbar: bool) -> None:
    """Write every merged weight; on an error, such as too little memory, put back those that were written."""
    before = []
    scratch: dict[Any, Tensor] = {}
    try:
        for folding in tqdm(foldings, desc="merge", unit="layer", disable=not progressbar):
            before.append((folding.base.state(), folding.slot.merged))
            _fold_one(folding, before[-1][0], scratch)
    except BaseException:
        for (_, slot, base, _), (state, merged) in zip(foldings, before, strict=False):
            base.restore(state)
            slot.merged = merged
            if not merged:
                base.layer.__dict__.pop(base.unmerged_attribute, None)
        raise


def _fold_one(folding: _Folding, before: dict[str, Any], scratch: dict[Any, Tensor]) -> None:
    base = folding.base
    old_bias = base.bias
    weight, bias = _merged(folding, scratch)
    base.layer.__dict__.setdefault(base.unmerged_attribute, before)
    if any(adapter.changes_weight for adapter in folding.adapters.values()):
        base.write(weight)
    if bias is not None and bias is not old_bias:
        base.write_bias(bias)
    folding.slot.merged += tuple(folding.adapters)


def unmerge_adapter(model: nn.Module) -> None:
    """Put the base's own weights back, bit for bit; the adapters act again."""
    adapters = adapter_set(model)
    for slot in _merged_slots(adapters):
        base = slot.base
        base.restore(base.layer.__dict__.pop(base.unmerged_attribute))
        slot.merged = ()
    adapters.merged = ()


def _merged_slots(adapters: AdapterSet) -> list[AdapterSlot]:
    """None of them is looked at while no adapter is merged, so that disabling costs nothing then."""
    return list(dict.fromkeys(slot for slot in adapters.layers.values() if slot.merged)) if adapters.merged else []


@contextlib.contextmanager
def original_weights(model: nn.Module) -> Iterator[None]:
    """The unmerged weights in place while inside, the merged ones again after; of several inside, the last puts them
    back. Raises RoutingError where another thread computes with the merged ones."""
    adapters = adapter_set(model)
    if not adapters.merged:
        yield
        return
    with _LOCK:
        if not adapters.unmerged_by and adapters.selection.runs_elsewhere():
            raise RoutingError(
                f"{list(adapters.merged)} are merged, and another thread is calling the model, so its weights cannot "
                "become the base's own now; call unmerge_adapter() first, then each thread has its own adapters"
            )
        if not adapters.unmerged_by:
            for slot in _merged_slots(adapters):
                base = slot.base
                slot.merged_state = base.state()
                base.restore(base.layer.__dict__[base.unmerged_attribute])
        adapters.unmerged_by += 1
    try:
        yield
    finally:
        with _LOCK:
            adapters.unmerged_by -= 1
            if not adapters.unmerged_by:
                for slot in adapters.layers.values():
                    state, slot.merged_state = slot.merged_state, None
                    if state is not None and slot.merged:  # not those that were unmerged inside
                        slot.base.restore(state)


def merge_and_unload(
    model: nn.Module,
    safe_merge: bool = False,
    adapter_names: str | list[str] | None = None,
    progressbar: bool = False,
) -> nn.Module:
    """Fold adapters in for good and take the slots out: the plain model remains, and no copy of the old weights.

    Modules that the active adapter trained whole take the originals' place. Raises MergeError as `merge_adapter`.
    """
    merge_adapter(model, adapter_names, safe_merge, progressbar)
    if adapter_names is not None:
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        adapter_set(model).selection.active = names
    for slot in adapter_set(model).layers.values():
        slot.unmerged_state = None
    remove_hosts(model, keep_trained=True)
    _note_untied_embeddings(model)
    return model


def unload(model: nn.Module) -> nn.Module:
    """Take the adapters out and leave the base exactly as it was before the first one."""
    unmerge_adapter(model)
    remove_hosts(model, keep_trained=False)
    return model


def _note_untied_embeddings(model: nn.Module) -> None:
    """A merge into one side of a tied pair leaves two weights; the configuration must say so, or loading ties them."""
    config = getattr(model, "config", None)
    if config is None or not getattr(config, "tie_word_embeddings", False):
        return
    pair = (getattr(model, name, lambda: None)() for name in ("get_input_embeddings", "get_output_embeddings"))
    source, head = (getattr(module, "weight", None) for module in pair)
    if source is not None and head is not None and source is not head:
        config.tie_word_embeddings = False
        logger.info("embeddings and output head are two weights after the merge: tie_word_embeddings is now False")
