"""Which adapters act, and which train. Switching is one assignment, whatever the numbers of layers and adapters."""

import contextlib
from collections.abc import Iterator

from torch import nn

from peftcore.adapter_set import adapter_set
from peftcore.errors import AdapterNameError
from peftcore.merge import original_weights
from peftcore.prompts.learner import PromptLearner


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
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """The base model alone while inside, also when adapters are merged; afterwards everything is as before."""
    selection = adapter_set(model).selection
    before = selection.disabled
    selection.disabled = True
    try:
        with original_weights(model):
            yield
    finally:
        selection.disabled = before
