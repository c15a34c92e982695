"""The adapters of a layer's replicas, which nn.DataParallel makes for each forward.

DataParallel copies every module of the model, and puts copies of the tensors into the modules' attributes. A layer's
adapters are no modules of the model, so the replica of a layer makes its own from the tensors in its submodules.
"""

from operator import attrgetter
from typing import TYPE_CHECKING, Any

from torch import nn

from peftcore.layers.wrapper import NamedModules

if TYPE_CHECKING:
    from peftcore.layers.named_tensors import TensorHolder


class ReplicaAdapters(NamedModules):
    """The adapters of a layer's replica, which DataParallel makes for one forward; made when they are first read.

    Args:
        holder: the layer.
        replica: its replica, into whose submodules DataParallel puts the copied tensors.
    """

    _of: Any
    _made: dict[str, nn.Module]

    def __init__(self, holder: "TensorHolder", replica: nn.Module):
        vars(self).update(_of=(holder, replica), _made={})
        super().__init__()

    @property
    def _modules(self) -> dict[str, nn.Module]:
        holder, replica = self._of
        for name in holder.adapters if not self._made else ():
            self._made[name] = _replica(holder, replica, name)
        return self._made

    @_modules.setter
    def _modules(self, value: dict[str, nn.Module]) -> None:  # type: ignore[override]
        """Ignore the empty dictionary that nn.Module makes for itself."""


def _replica(holder: "TensorHolder", replica: Any, name: str) -> nn.Module:
    """Return a copy of one adapter with the tensors that DataParallel has put into the layer's replica."""
    copied: Any = _shallow_copy(holder.adapters[name])
    for attribute, container in holder.containers().items():
        held = getattr(replica, attribute)
        for inside, full in container.names.get(name, {}).items():
            path, _, leaf = full.rpartition(".")
            module = copied.get_submodule(path)
            tensors = module._buffers if leaf in module._buffers else module._parameters
            tensors[leaf] = attrgetter(f"{name}.{inside}" if inside else name)(held)
    return copied


def _shallow_copy(module: nn.Module) -> nn.Module:
    copied: Any = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        copied._modules[name] = None if child is None else _shallow_copy(child)
    return copied
