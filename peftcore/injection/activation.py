"""Activation: which adapters are active, and which train. Switching between frozen adapters takes constant time."""

import contextlib
import re
import warnings
from collections.abc import Iterator, Sequence

from torch import nn

from peftcore.composition.algebra import Spec
from peftcore.composition.route import Route
from peftcore.errors import MergeError, RoutingError
from peftcore.injection import inject
from peftcore.injection.adapter_set import AdapterSet, adapter_set
from peftcore.injection.merge import original_weights, restore_unmerged

_EXPERT = re.compile(r"(^|\.)experts?\.\d+(\.|$)")


def set_adapter(model: nn.Module, names: str | list[str], inference_mode: bool = False) -> None:
    """Set the active adapters. As in HF PEFT, their parameters become trainable, and all other adapters are frozen.

    Merged adapters are unmerged first, with a warning.

    Args:
        model: the model with adapters.
        names: one name or several, in order.
        inference_mode: True freezes the active adapters, too.

    Raises:
        AdapterNameError: see `activate`.
    """
    adapters = adapter_set(model)
    activate(model, names)
    if adapters.merged:
        warnings.warn(
            f"set_adapter: {list(adapters.merged)} were merged into the base, and are unmerged now", stacklevel=3
        )
        restore_unmerged(model)
    adapters.train_active_only(not inference_mode)


def activate(model: nn.Module, names: str | list[str]) -> None:
    """Set the active adapters. `requires_grad` does not change, and merged adapters stay merged.

    Args:
        model: the model with adapters.
        names: one name or several, in order.

    Raises:
        AdapterNameError: a name is not loaded, or given twice; or several prompts are named, or several adapters with
            a copy of the same module (`modules_to_save`).
    """
    adapter_set(model).activate([names] if isinstance(names, str) else names)


def delete_adapter(model: nn.Module, *names: str) -> None:
    """Delete adapters. If all active ones are deleted, another one becomes active, as in HF PEFT.

    The parameters of that adapter then train, unless its configuration says `inference_mode`.

    Args:
        model: the model with adapters.
        names: the adapters.

    Raises:
        AdapterNameError: an adapter is not loaded, or in use by an open route.
        MergeError: an adapter is merged. No adapter is deleted then.
    """
    inject.delete_adapter_and_activate(model, *names)


def set_requires_grad(model: nn.Module, names: str | list[str], requires_grad: bool = True) -> None:
    """Set `requires_grad` of all parameters of adapters; other adapters stay as they are.

    Args:
        model: the model with adapters.
        names: one name or several.
        requires_grad: False freezes the adapters.

    Raises:
        AdapterNameError: a name is not loaded.
    """
    adapters = adapter_set(model)
    names = [names] if isinstance(names, str) else names
    adapters.require(*names)
    adapters.set_requires_grad(names, requires_grad)


def refresh_adapters(model: nn.Module) -> None:
    """Drop all values that were computed from weights, so the next forward computes them again.

    Call this after edits that cannot be noticed: in place through `parameter.data`, through memory shared with NumPy,
    by the replay of a CUDA graph. Every other change is noticed (`peftcore._util.fingerprint`).
    """
    adapters = adapter_set(model)
    adapters.selection.forget()
    for slot in adapters.layers.values():
        slot.base.clear_cache()
        for name in slot.adapters:
            slot.adapters[name].mark_changed()


@contextlib.contextmanager
def routed(model: nn.Module, specs: Spec | Sequence[Spec]) -> Iterator[Route]:
    """Open a route: this thread's calls of the model use a composition, or one composition for each row.

    Routes are thread-local, and do not change the active adapters.

    Args:
        model: the model with adapters.
        specs: one composition, or a list with one for each row of the batch.

    Yields:
        The route.

    Raises:
        AdapterNameError: a name is not loaded.
        RoutingError: adapters are merged; a name is given inside of `disable_adapter()`; or a mixed batch reaches a
            single expert.
    """
    adapters, route = adapter_set(model), Route(specs)
    adapters.require(*route.names)
    outer = adapters.selection.route
    if outer is not None and outer.is_final:
        if route.names:
            raise RoutingError(
                f"{list(route.names)} cannot be used inside of disable_adapter(), where the model is its base; leave "
                "that context first, or give None"
            )
        route.is_final = True
    if route.uniform is None:
        route.model = model
        _check_rows_are_seen(adapters, route)
    with adapters.selection.routed(route):
        adapters.require(*route.names)  # again, because from here on no other thread can delete or merge adapters
        if adapters.merged:
            raise RoutingError(
                f"{list(adapters.merged)} are merged into the base, so every row would use them; call unmerge_adapter "
                "first"
            )
        yield route


def _check_rows_are_seen(adapters: AdapterSet, route: Route) -> None:
    """Raise RoutingError for adapters on single experts, which get tokens of all rows mixed."""
    for path, slot in list(adapters.layers.items()):
        if _EXPERT.search(path) and any(name in slot.adapters for name in route.names):
            raise RoutingError(
                f"{path} is a single expert and gets tokens without their rows; route one adapter for the whole batch, "
                "or train adapters without the experts among their targets"
            )


@contextlib.contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Compute the base model alone inside of the context, even if adapters are merged.

    The context is a route to the base, so other threads keep their adapters. No route with adapters can be opened
    inside. All threads share one set of weights: while adapters are merged, calls by other threads are refused.

    Raises:
        RoutingError: adapters are merged, and another thread is calling the model.
    """
    route = Route(None)
    route.is_final = True
    with adapter_set(model).selection.routed(route), original_weights(model):  # in an open route, no thread merges
        yield


def switch_adapters(model: nn.Module, on: bool) -> None:
    """Enable or disable the active adapters, in every thread; an open route has precedence.

    Args:
        model: the model with adapters.
        on: False disables the adapters until the next call.

    Raises:
        MergeError: adapters are merged, so this function cannot disable them.
    """
    adapters = adapter_set(model)
    if adapters.merged and not on:
        raise MergeError(
            f"disable_adapters: {list(adapters.merged)} are merged into the base; call unmerge_adapter first, or use "
            "the context disable_adapter(), which puts the unmerged weights in place"
        )
    adapters.switch(on)
