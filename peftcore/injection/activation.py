"""Activation: which adapters are active, and which train. Switching takes constant time."""

import contextlib
import re
import warnings
from collections.abc import Iterator, Sequence

from torch import nn

from peftcore.composition.algebra import Spec
from peftcore.composition.route import Route
from peftcore.errors import AdapterNameError, MergeError, RoutingError
from peftcore.injection import inject
from peftcore.injection.adapter_set import AdapterSet, adapter_set
from peftcore.injection.merge import original_weights
from peftcore.prompts.learner import PromptLearner

_EXPERT = re.compile(r"(^|\.)experts?\.\d+(\.|$)")


def set_adapter(model: nn.Module, names: str | list[str]) -> None:
    """Make adapters the active ones.

    `requires_grad` does not change; see `train_active_only`.

    Args:
        model: the model with adapters.
        names: one name or several, in order.

    Raises:
        AdapterNameError: a name is not loaded, or given twice; or several prompts are named.
    """
    adapters = adapter_set(model)
    active = (names,) if isinstance(names, str) else tuple(names)
    adapters.require(*active)
    if len(set(active)) < len(active):
        raise AdapterNameError(f"set_adapter: each adapter at most once; got {list(active)}")
    kinds = {name: adapters.kinds[name] for name in active}
    prompts = [name for name, kind in kinds.items() if issubclass(kind, PromptLearner) and kind.exclusive]
    if len(prompts) > 1:
        raise AdapterNameError(
            f"set_adapter: {prompts} are prompts, and only one prompt can be active; name one of them"
        )
    adapters.selection.active = active


def delete_adapter(model: nn.Module, *names: str) -> None:
    """Delete adapters. If all active ones are deleted, the first remaining adapter becomes active, as in HF PEFT.

    Args:
        model: the model with adapters.
        names: the adapters.

    Raises:
        AdapterNameError: an adapter is not loaded, or in use by an open route.
        MergeError: an adapter is merged.
    """
    adapters = adapter_set(model)
    adapters.require(*names)
    active = [name for name in names if name in adapters.selection.active]
    for name in names:
        inject.delete_adapter(model, name)
    if active and adapters.configs and not adapters.selection.active:
        first = next(iter(adapters.configs))
        adapters.selection.active = (first,)
        warnings.warn(f"the active adapters {active} are deleted; {first!r} is the active one now", stacklevel=3)


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
    for name in names:
        for parameter in adapters.parameters(name):
            parameter.requires_grad_(requires_grad)
        if requires_grad:
            adapters.trainable.add(name)
        else:
            adapters.trainable.discard(name)


def train_active_only(model: nn.Module, trains: bool = True) -> None:
    """Set `requires_grad` as HF PEFT's `set_adapter` does: the active adapters' parameters train, all others do not.

    Args:
        model: the model with adapters.
        trains: False freezes the active adapters, too.
    """
    adapters = adapter_set(model)
    active = set(adapters.selection.active)
    for name in adapters.trainable - active:
        set_requires_grad(model, name, False)
    for name in active:  # last, because adapters may share parameters
        if trains or name in adapters.trainable:
            set_requires_grad(model, name, trains)


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
    if adapters.merged:
        raise RoutingError(
            f"{list(adapters.merged)} are merged into the base, so every row would use them; call unmerge_adapter first"
        )
    if route.uniform is None:
        route.model = model
        _check_rows_are_seen(adapters, route)
    with adapters.selection.routed(route):
        adapters.require(*route.names)  # again, because from here on no other thread can delete them
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
    with original_weights(model), adapter_set(model).selection.routed(route):
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
    adapters.selection.switched_off = not on
