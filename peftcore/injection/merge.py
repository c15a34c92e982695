"""Merging adapters into base weights, and unmerging bit for bit.

The unmerged parameters are kept while merged ones are in their place, so unmerging restores the original tensors. Until
then each merged weight takes one more copy in memory. `merge_and_unload` keeps no copy.
"""

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight
from peftcore.errors import MergeError, PromptMergeError, RoutingError
from peftcore.injection.adapter_set import AdapterSet, adapter_set
from peftcore.injection.inject import remove_wrappers
from peftcore.layers.adapter_slot import AdapterSlot, with_trained_biases


class _LayerMerge(NamedTuple):
    """The adapters to merge into one base weight."""

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
    """Merge adapters into their base weights, in place; other active adapters stay in effect.

    Modules that an adapter trains in full (`modules_to_save`) are used while it is active, merged or not, as in PEFT.
    Warns if the adapters are merged already.

    Args:
        model: the model with adapters.
        adapter_names: the adapters, in order; None for the active ones.
        safe_merge: check each merged weight for NaN and Inf before any weight is written.
        progressbar: show a progress bar over the layers.

    Raises:
        MergeError: an adapter cannot be merged, a merged weight is not finite, adapters are disabled, or a route is
            open. Nothing is changed then.
        AdapterNameError: a name is not loaded.
    """
    adapters = adapter_set(model)
    if not merge_slots(adapters, adapters.layers.values(), adapter_names, safe_merge, progressbar) and adapters.merged:
        warnings.warn(f"All adapters are already merged: {', '.join(adapters.merged)}", stacklevel=4)


@torch.no_grad()
def merge_slots(
    adapters: AdapterSet,
    slots: Iterable[AdapterSlot],
    adapter_names: str | list[str] | None = None,
    safe_merge: bool = False,
    progressbar: bool = False,
) -> bool:
    """Merge adapters into the base weights of some slots; see `merge_adapter`.

    Other threads that open a route or begin a call of the model wait for the end of the merge.

    Args:
        adapters: the adapters of the model.
        slots: the slots; a layer that stands at several paths may be among them several times.
        adapter_names: see `merge_adapter`.
        safe_merge: see `merge_adapter`.
        progressbar: see `merge_adapter`.

    Returns:
        False if no weight was changed.

    Raises:
        MergeError, AdapterNameError: see `merge_adapter`.
    """
    if adapters.selection.switched_off:
        raise MergeError("the adapters are disabled, and merged ones would be in effect; call enable_adapters first")
    route = adapters.selection.route
    if adapters.unmerged_by or (route is not None and route.is_final):
        raise MergeError("merge_adapter inside of disable_adapter(), where only the base is in effect; leave it first")
    chosen = adapters.selection.active if adapter_names is None else adapter_names
    names = [chosen] if isinstance(chosen, str) else list(chosen)
    adapters.require(*names)
    with adapters.selection.locked():
        if adapters.selection.has_open_routes:
            raise MergeError(
                "merge_adapter while a route is open (or disable_adapter() in another thread), whose rows would all "
                "use the merged adapters; leave the route, or wait for its end"
            )
        merges = _checked_merges(adapters, slots, names, check_values=safe_merge)
        if before := dict.fromkeys(name for merge in merges for name in merge.slot.merged_names):
            added = dict.fromkeys(name for merge in merges for name in merge.adapters)
            warnings.warn(
                f"Already following adapters were merged: {', '.join(before)}. Now merged as well: {', '.join(added)}",
                stacklevel=5,
            )
        _write(merges, progressbar)
        merged = (name for merge in merges for name in merge.adapters)
        adapters.merged = tuple(dict.fromkeys((*adapters.merged, *merged)))
    return bool(merges)


def check_mergeable(model: nn.Module, adapter_names: str | list[str]) -> None:
    """Check that adapters can be merged, without computing any weight.

    Args:
        model: the model with adapters.
        adapter_names: one name or several.

    Raises:
        MergeError: an adapter cannot be merged.
        AdapterNameError: a name is not loaded.
    """
    adapters = adapter_set(model)
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    adapters.require(*names)
    _checked_merges(adapters, adapters.layers.values(), names, check_values=False)


def _checked_merges(
    adapters: AdapterSet, slots: Iterable[AdapterSlot], names: list[str], check_values: bool
) -> list[_LayerMerge]:
    if prompts := [name for name in names if name in adapters.prompts]:
        raise PromptMergeError(
            f"{prompts} are prompts, which cannot be merged into weights, so nothing was merged; name only the others "
            "in adapter_names"
        )
    merges = []
    for slot in dict.fromkeys(slots):
        adapters_here = slot.adapters
        new = {name: adapters_here[name] for name in names if name in adapters_here and name not in slot.merged_names}
        if new:
            merges.append(_LayerMerge(slot.path, slot, slot.base, new))
    for merge in merges:
        _check(merge)
        if check_values:
            _check_values(merge)
    return merges


def _check(merge: _LayerMerge) -> None:
    bias = merge.base.bias
    before = [merge.slot.adapters[name] for name in merge.slot.merged_names]
    for name, first in merge.adapters.items():
        for adapter in with_trained_biases([first]):
            try:
                adapter.check_mergeable_with(before)
                before.append(adapter)
                adapter.check_mergeable()
                if adapter.changes_weight:
                    merge.base.check_writable()
                adapter.merged_bias(bias)
            except MergeError as error:
                raise MergeError(f"{merge.path}: adapter {name!r} cannot be merged: {error}") from error


def _check_values(merge: _LayerMerge) -> None:
    if _stays_finite(merge):
        return
    items = list(merge.adapters.items())
    firsts = (items[: count + 1] for count in range(len(items)))
    name = next(first[-1][0] for first in firsts if not _stays_finite(merge._replace(adapters=dict(first))))
    raise MergeError(
        f"merging {name!r} into {merge.path} gives NaN or Inf in {merge.base.dtype}, so nothing was merged; if the "
        "adapter is broken, train it again at a lower learning rate or load an earlier checkpoint"
    )


def _stays_finite(merge: _LayerMerge) -> bool:
    """Return True if the merged weight and bias are finite in the base's type (float16 ends at 65504)."""
    weight, bias = _merged(merge)
    return _is_finite(weight.to(merge.base.dtype)) and (bias is None or _is_finite(bias.to(merge.base.bias)))


def _is_finite(values: Tensor) -> bool:
    """Return True if no element is NaN or infinite."""
    # a sum reads the elements once, and `isfinite` several times; but a sum can exceed the type by itself
    return bool(values.sum(dtype=torch.promote_types(values.dtype, torch.float32)).isfinite()) or bool(
        values.isfinite().all()
    )


def _merged(merge: _LayerMerge, scratch: dict[Any, Tensor] | None = None) -> tuple[Tensor, Tensor | None]:
    """Return the merged weight and bias; the weight may be in `scratch`, memory shared by all layers of one shape."""
    read, bias = merge.base.read(), merge.base.bias
    wide = torch.promote_types(read.dtype, torch.float32)  # half would round after every adapter
    in_place = scratch is not None and read.dtype != wide and not merge.base.quantized
    weight = _copied(read, wide, scratch) if in_place and scratch is not None else read.to(wide)
    for adapter in with_trained_biases(merge.adapters.values()):
        weight = adapter.merge_into(weight) if in_place else adapter.merged_weight(weight)
        bias = adapter.merged_bias(bias)
    return weight, bias


def _merged_bias(merge: _LayerMerge) -> Tensor | None:
    bias = merge.base.bias
    for adapter in with_trained_biases(merge.adapters.values()):
        bias = adapter.merged_bias(bias)
    return bias


def _copied(weight: Tensor, dtype: torch.dtype, scratch: dict[Any, Tensor]) -> Tensor:
    """Copy a weight into reused memory, because allocating new pages takes longer than the arithmetic."""
    key = (weight.shape, weight.device)
    if key not in scratch:
        scratch[key] = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    return scratch[key].copy_(weight)


def _write(merges: list[_LayerMerge], progressbar: bool) -> None:
    """Write every merged weight; on an error, such as too little memory, restore the weights already written."""
    before = []
    scratch: dict[Any, Tensor] = {}
    first_with: dict[int, _LayerMerge] = {}  # {id of an unmerged weight: the first merge into it}
    try:
        for merge in tqdm(merges, desc="merge", unit="layer", disable=not progressbar):
            before.append((merge.base.state(), merge.slot.merged_names))
            first = first_with.setdefault(id(before[-1][0].get("weight")), merge)
            _write_one(merge, before[-1][0], scratch, first if _stay_tied(first, merge) else None)
    except BaseException:
        for (_, slot, base, _), (state, merged) in zip(merges, before, strict=False):
            base.restore(state)
            slot.merged_names = merged
            if not merged:
                base.layer.__dict__.pop(base.unmerged_attribute, None)
        raise


def _stay_tied(first: _LayerMerge, second: _LayerMerge) -> bool:
    """Return True if two merges into one shared weight give the same weight."""
    if first is second or first.adapters.keys() != second.adapters.keys():
        return False
    return all(adapter.changes_like(first.adapters[name]) for name, adapter in second.adapters.items())


def _write_one(
    merge: _LayerMerge, before: dict[str, Any], scratch: dict[Any, Tensor], tied: _LayerMerge | None
) -> None:
    """Write the merged weight and bias of one layer.

    Args:
        merge: the layer and its adapters.
        before: the parameters of the layer from before.
        scratch: see `_merged`.
        tied: a merge that was written before, and whose weight the layer shares; None to compute the weight.
    """
    base = merge.base
    old_bias = base.bias
    weight, bias = _merged(merge, scratch) if tied is None else (None, _merged_bias(merge))
    base.layer.__dict__.setdefault(base.unmerged_attribute, before)
    if tied is not None:
        base.layer._parameters["weight"] = tied.base.layer._parameters["weight"]
    elif weight is not None and any(adapter.changes_weight for adapter in merge.adapters.values()):
        base.write(weight)
    if bias is not None and bias is not old_bias:
        base.write_bias(bias)
    merge.slot.merged_names += tuple(merge.adapters)


def unmerge_adapter(model: nn.Module) -> None:
    """Restore the unmerged base weights, bit for bit; the active adapters are in effect again.

    Warns if no adapter is merged.
    """
    if not adapter_set(model).merged:
        warnings.warn("Already unmerged: no adapter is merged into the base, so nothing is changed", stacklevel=4)
    restore_unmerged(model)


def restore_unmerged(model: nn.Module) -> None:
    """Restore the unmerged base weights; a model without merged adapters stays as it is."""
    adapters = adapter_set(model)
    unmerge_slots(adapters, _merged_slots(adapters))


def unmerge_slots(adapters: AdapterSet, slots: Iterable[AdapterSlot]) -> None:
    """Restore the unmerged weights of some slots; slots without merged adapters stay as they are.

    Args:
        adapters: the adapters of the model.
        slots: the slots.
    """
    with adapters.selection.locked():
        for slot in slots:
            if slot.merged_names:
                base = slot.base
                base.restore(base.layer.__dict__.pop(base.unmerged_attribute))
                slot.merged_names = ()
        still = {name for slot in _merged_slots(adapters) for name in slot.merged_names}
        adapters.merged = tuple(name for name in adapters.merged if name in still)


@contextlib.contextmanager
def merged(model: nn.Module, adapter_names: str | list[str] | None = None, safe_merge: bool = False) -> Iterator[None]:
    """Merge adapters for the time of the context; the unmerged weights come back bit for bit, also after an error.

    Args:
        model: the model with adapters.
        adapter_names: see `merge_adapter`.
        safe_merge: see `merge_adapter`.

    Raises:
        MergeError: adapters are merged already, or see `merge_adapter`.
        AdapterNameError: a name is not loaded.
    """
    if names := adapter_set(model).merged:
        raise MergeError(f"{list(names)} are merged already; call unmerge_adapter first, or go without the context")
    merge_adapter(model, adapter_names, safe_merge)
    try:
        yield
    finally:
        restore_unmerged(model)


def _merged_slots(adapters: AdapterSet) -> list[AdapterSlot]:
    """Return the slots with merged adapters, without a search if no adapter is merged."""
    return (
        list(dict.fromkeys(slot for slot in adapters.layers.values() if slot.merged_names)) if adapters.merged else []
    )


@contextlib.contextmanager
def original_weights(model: nn.Module) -> Iterator[None]:
    """Put the unmerged weights in place inside of the context; the last context to end restores the merged ones.

    Raises:
        RoutingError: adapters are merged, and another thread is calling the model.
    """
    adapters = adapter_set(model)
    with adapters.selection.locked():
        exchanges = bool(adapters.merged)
        if exchanges and not adapters.unmerged_by:
            if adapters.selection.runs_elsewhere():
                raise RoutingError(
                    f"{list(adapters.merged)} are merged, and another thread is calling the model, so the base weights "
                    "cannot be restored now; call unmerge_adapter() first, then each thread has its own adapters"
                )
            for slot in _merged_slots(adapters):
                base = slot.base
                slot.merged_state = base.state()
                base.restore(base.layer.__dict__[base.unmerged_attribute])
        adapters.unmerged_by += exchanges
    try:
        yield
    finally:
        with adapters.selection.locked():
            adapters.unmerged_by -= exchanges
            if exchanges and not adapters.unmerged_by:
                for slot in adapters.layers.values():
                    state, slot.merged_state = slot.merged_state, None
                    if state is not None and slot.merged_names:  # not if unmerged inside of the context
                        slot.base.restore(state)


def merge_and_unload(
    model: nn.Module,
    safe_merge: bool = False,
    adapter_names: str | list[str] | None = None,
    progressbar: bool = False,
) -> nn.Module:
    """Merge adapters for good and return the plain model, without wrappers and copies of the old weights.

    Modules that the active adapter trained in full (`modules_to_save`) replace the originals.

    Args:
        model: the model with adapters; changed in place.
        safe_merge: see `merge_adapter`.
        adapter_names: the adapters, in order; None for the active ones.
        progressbar: see `merge_adapter`.

    Returns:
        The model.

    Raises:
        MergeError: see `merge_adapter`.
    """
    adapters = adapter_set(model)
    merge_slots(adapters, adapters.layers.values(), adapter_names, safe_merge, progressbar)
    if adapter_names is not None:
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        adapters.selection.active = names
    for slot in adapters.layers.values():
        slot.unmerged_state = None
    remove_wrappers(model, keep_trained=True)
    _note_untied_embeddings(model)
    return model


def unload(model: nn.Module) -> nn.Module:
    """Remove all adapters and restore the base exactly as it was before the first one.

    Returns:
        The model.
    """
    restore_unmerged(model)
    remove_wrappers(model, keep_trained=False)
    return model


def _note_untied_embeddings(model: nn.Module) -> None:
    """Set `tie_word_embeddings` to False where tied weights differ after a merge; else loading ties them again.

    The option is one for all tied weights of a transformers model: embeddings of encoder, decoder and head in BART.
    Those that are still one parameter get their own copies, because a shared parameter is saved at one path only.
    A checkpoint that holds two weights in spite of the option is loaded with two, and no tied weights are listed.
    """
    for path, owner in list(model.named_modules()):
        config: Any = getattr(owner, "config", None)
        tied: Any = getattr(owner, "all_tied_weights_keys", None)
        if tied is None or not getattr(config, "tie_word_embeddings", False):
            continue
        parameters = dict(owner.named_parameters(remove_duplicate=False))
        present = {target: source for target, source in tied.items() if {target, source} <= parameters.keys()}
        pairs = [(target, parameters[target], parameters[source]) for target, source in present.items()]
        if all(one is other for _, one, other in pairs) and (pairs or not _has_two_embeddings(owner)):
            continue
        seen = {id(other) for _, _, other in pairs}
        for target, one, _ in pairs:
            if id(one) in seen:
                parent, _, name = target.rpartition(".")
                copy = nn.Parameter(one.detach().clone(), requires_grad=one.requires_grad)
                owner.get_submodule(parent)._parameters[name] = copy
            seen.add(id(one))
        config.tie_word_embeddings = False
        warnings.warn(
            f"tied weights of {path or 'the model'} differ after the merge: tie_word_embeddings is now False",
            stacklevel=3,
        )


def _has_two_embeddings(model: Any) -> bool:
    """Return True if the input embeddings and the head of a transformers model are two weights."""
    if (head := model.get_output_embeddings()) is None:
        return False
    weights = [getattr(end, "weight", None) for end in (head, model.get_input_embeddings())]
    return all(weight is not None for weight in weights) and weights[0] is not weights[1]
