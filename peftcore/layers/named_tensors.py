"""The submodules of a layer that hold its adapters' tensors under HF PEFT's names.

HF PEFT's layer has one container per kind of tensor, `q_proj.lora_A.default.weight`. Here each adapter has its tensors
itself and is no submodule of the layer. The layer's submodules are the base layer and the containers, in which each
tensor stands under the name that it has in HF PEFT.
"""

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from functools import cache
from typing import Any
from weakref import WeakValueDictionary

from torch import Tensor, nn

from peftcore.adapter import Adapter
from peftcore.errors import PeftError
from peftcore.layers.adapter_slot import AdapterSlot
from peftcore.layers.factor_view import FactorView, TensorView, factor_view
from peftcore.layers.peft_attributes import IN_A_MODULE, PerAdapter
from peftcore.layers.replicas import ReplicaAdapters
from peftcore.layers.trained_bias import TrainedBias
from peftcore.layers.wrapper import NamedModules

FEW_ADAPTERS = 8
"""Number of adapters up to which a layer keeps the modules that show their tensors, about 5 kB for each adapter."""


def tensor_names(adapter: Adapter) -> dict[str, Mapping[str, str]]:
    """Return {attribute of HF PEFT's layer: {name inside of it: name in the adapter}} of all tensors of an adapter.

    The name inside is "" for a tensor that is the attribute's element itself, as with `q_proj.ia3_l.default`. Tensors
    that are not saved have names that begin with the method's.
    """
    method = f"{getattr(adapter.printed[0], 'peft_type', '').lower()}_"
    names: dict[str, dict[str, str]] = {}
    keys = adapter.checkpoint_keys()
    for path, module in adapter.named_modules():
        tensors = {**module._parameters, **module._buffers}
        for own in (own for own, tensor in tensors.items() if tensor is not None):
            name = f"{path}.{own}" if path else own
            if isinstance(module, TrainedBias):
                key = "trained_bias.bias"
            elif name in keys or name.startswith("shared."):
                key = keys.get(name, name.removeprefix("shared."))
            else:
                key = name if name.startswith(method) or isinstance(tensors[own], nn.Parameter) else f"{method}{name}"
            attribute, _, inside = key.partition(".")
            if attribute in IN_A_MODULE and not inside:
                inside = "weight"
            names.setdefault(attribute, {})[inside] = name
    return {attribute: _same_for_all(tuple(inside.items())) for attribute, inside in names.items()}


@cache
def _same_for_all(names: tuple[tuple[str, str], ...]) -> Mapping[str, str]:
    """Return one dictionary for all adapters with the same names, because there may be thousands."""
    return dict(names)


class _Container(PerAdapter, TensorView):
    """{adapter name: element} of one attribute of HF PEFT's layer: modules, or tensors.

    Args:
        slot: the layer's adapters.
        attribute: the attribute's name, such as "lora_A".
    """

    def __init__(self, slot: AdapterSlot, attribute: str):
        vars(self).update(_slot=slot, _attribute=attribute, names={}, own={}, _views={})
        nn.Module.__init__(self)

    names: dict[str, Mapping[str, str]]
    """{adapter: names of its tensors, as `tensor_names` returns them for one attribute}."""
    own: dict[str, nn.Module]
    """{adapter: its dropout}."""
    _views: MutableMapping[str, FactorView]
    """{adapter: module}, made at access; with more than `FEW_ADAPTERS`, only those that are in use elsewhere."""

    @property
    def _modules(self) -> dict[str, nn.Module]:
        return self.own | {name: self._view(name) for name, names in self.names.items() if "" not in names}

    @_modules.setter
    def _modules(self, value: dict[str, nn.Module]) -> None:  # type: ignore[override]
        """Ignore the empty dictionary that nn.Module makes for itself."""

    def _view(self, name: str) -> FactorView:
        if type(self._views) is dict and len(self.names) > FEW_ADAPTERS:
            vars(self)["_views"] = WeakValueDictionary(self._views)
        adapter, view = self.adapter_of(name), self._views.get(name)
        if view is None or view.adapter_of("") is not adapter:
            view = self._views[name] = factor_view(adapter, self._attribute, self.names[name])
        return view

    def hide(self, name: str) -> None:
        """Remove the element of an adapter, if there is one."""
        self.names.pop(name, None)
        self.own.pop(name, None)
        self._views.pop(name, None)

    def is_empty(self) -> bool:
        """Return True if there is no element."""
        return not (self.names or self.own)

    def tensor_names(self) -> Iterable[str]:
        """Return the names of the adapters whose elements are tensors."""
        return [name for name, names in self.names.items() if "" in names]

    def place(self, name: str) -> tuple[nn.Module, str]:
        """Return the module that holds an adapter's tensor, and the tensor's name there."""
        path, _, own = self.names[name][""].rpartition(".")
        return self.adapter_of(name).get_submodule(path), own

    def adapter_of(self, name: str) -> Adapter:
        """Return the adapter of a name."""
        return self._slot.adapters[name]

    def __getitem__(self, name: str) -> Any:
        if name in self.own:
            return self.own[name]
        if name not in self.names:
            return super().__getitem__(name)
        return getattr(*self.place(name)) if "" in self.names[name] else self._view(name)

    def __contains__(self, name: object) -> bool:
        return name in self.own or name in self.names or super().__contains__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if "" in self.names.get(name, ()):
            self.put(name, value)
        elif isinstance(value, nn.Module):
            raise PeftError(
                f"{self._attribute}.{name} shows tensors of an adapter and cannot be replaced by a module; for FSDP, "
                "wrap whole blocks, as peftcore.utils.fsdp_auto_wrap_policy does"
            )
        else:
            object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        TensorView.__delattr__(self, name)

    def __getattr__(self, name: str) -> Any:
        if "_views" in vars(self) and name in self:
            return self[name]
        raise AttributeError(f"{vars(self).get('_attribute')} has no adapter {name!r}")

    __class__ = property(lambda self: type(self))  # type: ignore[assignment]
    __hash__ = nn.Module.__hash__  # type: ignore[assignment]
    __eq__ = nn.Module.__eq__  # type: ignore[assignment]
    __repr__ = nn.Module.__repr__  # type: ignore[assignment]

    def __reduce_ex__(self, protocol: Any) -> Any:  # a copy of the container alone has tensors of its own
        return self.plain, (dict(self),)

    def _replicate_for_data_parallel(self) -> nn.Module:
        return nn.Module()


class ShownModules(_Container, nn.ModuleDict):  # type: ignore[misc]
    """A container whose elements are modules, such as `lora_A`."""

    plain = nn.ModuleDict

    def _get_name(self) -> str:
        return "ModuleDict"


class ShownTensors(_Container, nn.ParameterDict):  # type: ignore[misc]
    """A container whose elements are tensors, such as `ia3_l`."""

    plain = nn.ParameterDict

    def _get_name(self) -> str:
        return "ParameterDict"


class SlotAdapters(NamedModules):
    """The adapters of a slot by name. Additions and removals change the containers of the slot's module.

    Args:
        holder: the module with the containers.
    """

    _holder: Any

    def __init__(self, holder: "TensorHolder"):
        super().__init__()
        vars(self)["_holder"] = holder  # no submodule

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):
            self._holder.show(name)

    def __setitem__(self, name: str, module: nn.Module) -> None:
        super().__setitem__(name, module)
        self._holder.show(name)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self._holder.hide(name)

    def clear(self) -> None:
        """Remove all adapters."""
        for name in list(self):
            del self[name]


class TensorHolder(nn.Module):
    """A module whose submodules are the containers of its adapters' tensors."""

    adapters: SlotAdapters

    def add_slot(self) -> None:
        """Add an empty slot."""
        vars(self)["adapters"] = SlotAdapters(self)  # no submodule

    def show(self, name: str) -> None:
        """Make the submodules that show an adapter's tensors.

        A submodule whose name would hide an attribute of the layer has "adapter_" before its name.
        """
        self.hide(name)
        adapter: Any = self.adapters[name]
        if adapter.dropout_module is not None:
            self._container(adapter.dropout_option, ShownModules).own[name] = adapter.dropout_module
        for attribute, names in tensor_names(adapter).items():
            kind = ShownTensors if "" in names else ShownModules
            hides = hasattr(type(self), attribute) or hasattr(adapter.base.layer, attribute)
            self._container(f"adapter_{attribute}" if hides else attribute, kind).names[name] = names

    def _container(self, attribute: str, kind: type[_Container]) -> _Container:
        if attribute not in self._modules:
            self._modules[attribute] = kind(self, attribute)  # type: ignore[arg-type]
        return self._modules[attribute]  # type: ignore[return-value]

    def hide(self, name: str) -> None:
        """Remove the submodules that show an adapter's tensors."""
        for attribute, container in list(self.containers().items()):
            container.hide(name)
            if container.is_empty():
                del self._modules[attribute]

    def containers(self) -> dict[str, _Container]:
        """Return {attribute: container} of the submodules that show tensors."""
        return {name: module for name, module in self._modules.items() if isinstance(module, _Container)}

    def train(self, mode: bool = True) -> Any:
        """Set the training mode of the module and its adapters."""
        self.training = mode
        for module in self.children():
            if isinstance(module, _Container):
                vars(module)["training"] = mode  # what it shows has the adapter's mode
            else:
                module.train(mode)
        if "adapters" in vars(self):
            self.adapters.train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if recurse:
            for module in self.children():
                if not isinstance(module, _Container):
                    module._apply(fn)
            self.adapters._apply(fn)
        return self

    def extra_repr(self) -> str:
        """Return the options of each adapter that are not at their defaults."""
        parts = {name: self.adapters[name].extra_repr() for name in self.adapters}
        return "\n".join(f"{name}: {options}" for name, options in parts.items() if options)

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()  # type: ignore[operator]
        vars(replica)["adapters"] = ReplicaAdapters(self, replica)
        return replica

    def __getstate__(self) -> dict[str, Any]:
        containers = self.containers()
        modules = {name: module for name, module in self._modules.items() if name not in containers}
        shown = [(type(one), name, one.names, one.own) for name, one in containers.items()]
        return {**vars(self), "_modules": modules, "_shown": shown}

    def __setstate__(self, state: dict[str, Any]) -> None:
        shown = state.pop("_shown")
        super().__setstate__(state)
        for kind, attribute, names, own in shown:  # without the adapters, which may be incomplete until all is read
            container = self._modules[attribute] = kind(self, attribute)
            vars(container).update(names=names, own=own)
