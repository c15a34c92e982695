"""Which adapters act, and which train. Switching is one assignment, whatever the numbers of layers and adapters."""

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
    """Make these adapters the active ones, in order.

    Which adapters train does not change: that is `is_trainable` when one is added, or `set_requires_grad`.
    Raises AdapterNameError for a name that is not loaded or given twice.
    """
    adapters = adapter_set(model)
    chosen = (names,) if isinstance(names, str) else tuple(names)
    adapters.require(*chosen)
    if len(set(chosen)) < len(chosen):
        raise AdapterNameError(f"set_adapter: each adapter at most once; got {list(chosen)}")
    kinds = {name: adapters.kinds[name] for name in chosen}
    feeding = [name for name, kind in kinds.items() if issubclass(kind, PromptLearner) and kind.exclusive]
    if len(feeding) > 1:
        raise AdapterNameError(f"set_adapter: {feeding} are prompts, and one at a time can stand before the text")
    adapters.selection.active = chosen


def delete_adapter(model: nn.Module, *names: str) -> None:
    """Remove adapters. If no active one is left, the first that is left becomes active, as in HF PEFT."""
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
    """Let adapters train, or freeze them; every other adapter stays as it is."""
    adapters = adapter_set(model)
    chosen = [names] if isinstance(names, str) else names
    adapters.require(*chosen)
    for name in chosen:
        for parameter in adapters.parameters(name):
            parameter.requires_grad_(requires_grad)


def refresh_adapters(model: nn.Module) -> None:
    """Have everything that was computed from the weights computed anew at the next forward.

    Needed after edits that nothing shows: in place through `parameter.data`, through memory shared with NumPy, by a
    CUDA graph that is replayed. Every other change is noticed (`peftcore.composition.fingerprint`).
    """
    adapters = adapter_set(model)
    adapters.selection.forget()
    for site in adapters.layers.values():
        site.base.clear_cache()
        for name in site.adapters:
            site.adapters[name].mark_changed()


@contextlib.contextmanager
def routed(model: nn.Module, given: Spec | Sequence[Spec]) -> Iterator[Route]:
    """This thread's calls of the model go by a composition, or by a list of them, one for each row of the batch.

    What `set_adapter` has made active is untouched, and other threads do not see it. Raises AdapterNameError for names
    that are not loaded, RoutingError for what no batch can be computed by, and for adapters inside `disable_adapter()`.
    """
    adapters, route = adapter_set(model), Route(given)
    adapters.require(*route.names)
    outer = adapters.selection.route
    if outer is not None and outer.is_final:
        if route.names:
            raise RoutingError(
                f"{list(route.names)} are to act inside of disable_adapter(), where the model is its base; leave it "
                "first, or name None there"
            )
        route.is_final = True
    if adapters.merged:
        raise RoutingError(
            f"{list(adapters.merged)} are merged into the base, where every row would have them; unmerge_adapter first"
        )
    if route.uniform is None:
        route.model = model
        _check_rows_are_seen(adapters, route)
    with adapters.selection.routed(route):
        adapters.require(*route.names)  # from here on none of them can be deleted
        yield route


def _check_rows_are_seen(adapters: AdapterSet, route: Route) -> None:
    """RoutingError for layers where tokens of all rows lie mixed: single experts, which get those that chose them."""
    for path, site in list(adapters.layers.items()):
        if _EXPERT.search(path) and any(name in site.adapters for name in route.names):
            raise RoutingError(
                f"{path} is one expert of many and sees tokens without their rows; route one adapter for the whole "
                "batch, or train adapters that leave the experts out"
            )


@contextlib.contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """The base model alone while inside, also when adapters are merged; afterwards everything is as before.

    It is a route to the base that no other may be opened in, so other threads do not see it. Merged adapters are in the
    one set of weights that all threads have: calls by other threads are then refused while inside. Raises RoutingError
    if such a call runs already.
    """
    route = Route(None)
    route.is_final = True
    with original_weights(model), adapter_set(model).selection.routed(route):
        yield


def switch_adapters(model: nn.Module, on: bool) -> None:
    """Let the active adapters act or not, for every thread, until the next call. An open route stands over it.

    Raises MergeError while adapters are merged into the base, where nothing here could take them out.
    """
    adapters = adapter_set(model)
    if adapters.merged and not on:
        raise MergeError(
            f"disable_adapters: {list(adapters.merged)} are merged into the base; call unmerge_adapter first, or use "
            "the context disable_adapter(), which sets merged weights aside"
        )
    adapters.selection.switched_off = not on
