"""Which adapters act, and which train. Switching is one assignment, whatever the numbers of layers and adapters."""

import contextlib
import re
from collections.abc import Iterator, Sequence

from torch import nn

from peftcore.adapter_set import AdapterSet, adapter_set
from peftcore.composition.algebra import Spec
from peftcore.composition.route import Route
from peftcore.errors import AdapterNameError, MergeError, RoutingError
from peftcore.merge import original_weights
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


def set_requires_grad(model: nn.Module, names: str | list[str], requires_grad: bool = True) -> None:
    """Let adapters train, or freeze them; every other adapter stays as it is."""
    adapters = adapter_set(model)
    chosen = [names] if isinstance(names, str) else names
    adapters.require(*chosen)
    for name in chosen:
        for parameter in adapters.parameters(model, name):
            parameter.requires_grad_(requires_grad)


@contextlib.contextmanager
def routed(model: nn.Module, given: Spec | Sequence[Spec]) -> Iterator[Route]:
    """This thread's calls of the model go by a composition, or by a list of them, one for each row of the batch.

    What `set_adapter` has made active is untouched, and other threads do not see it. Raises AdapterNameError for names
    that are not loaded, RoutingError for what no batch can be computed by.
    """
    adapters, route = adapter_set(model), Route(given)
    adapters.require(*route.names)
    if adapters.merged:
        raise RoutingError(
            f"{list(adapters.merged)} are merged into the base, where every row would have them; unmerge_adapter first"
        )
    if route.uniform is None:
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
    """The base model alone while inside, also when adapters are merged; afterwards everything is as before."""
    selection = adapter_set(model).selection
    before = selection.disabled
    selection.disabled = True
    over = selection.routed(Route(None)) if selection.route is not None else contextlib.nullcontext()
    try:
        with original_weights(model), over:
            yield
    finally:
        selection.disabled = before


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
