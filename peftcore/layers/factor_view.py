"""Modules that show an adapter's tensors under the names of HF PEFT's layers, such as `q_proj.lora_A.default.weight`.

An adapter holds its tensors itself, and its layer reads them there. The modules of this file have the adapter's own
parameters and buffers: whatever replaces a tensor in them (`to`, a load, a parallel wrapper) replaces it in the
adapter.
"""

import functools
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.adapter import Adapter
from peftcore.bases.offload import offloading
from peftcore.errors import ConfigError, PeftError


class TensorTable(dict[str, Any]):
    """The parameters or the buffers in a `TensorView`; writing one writes it into its adapter.

    Args:
        view: the module that shows the tensors.
        table: "_parameters" or "_buffers".
    """

    def __init__(self, view: "TensorView", table: str):
        self._view, self._table = view, table
        for name in view.tensor_names():
            module, own = view.place(name)
            tensors = getattr(module, table)
            if own in tensors:
                super().__setitem__(name, tensors[own])

    def __setitem__(self, name: str, tensor: Any) -> None:
        super().__setitem__(name, tensor)
        module, own = self._view.place(name)
        getattr(module, self._table)[own] = tensor
        self._view.adapter_of(name).mark_changed()

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        module, own = self._view.place(name)
        del getattr(module, self._table)[own]
        self._view.adapter_of(name).mark_changed()

    def pop(self, name: str, *default: Any) -> Any:
        """Remove a tensor and return it; without it, return the default, or raise KeyError."""
        if name not in self and default:
            return default[0]
        tensor = self[name]
        del self[name]
        return tensor


def _table_of_adapters(table: str) -> property:
    def read(view: "TensorView") -> TensorTable:
        return TensorTable(view, table)

    def ignore(view: "TensorView", value: Any) -> None:
        """Ignore the empty table that nn.Module makes for itself."""

    return property(read, ignore)


def _warned(register: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that registers a hook with a warning that it does not run when the layer is called."""

    @functools.wraps(register)
    def registered(*args: Any, **kwargs: Any) -> Any:
        warnings.warn(
            "the layer computes with an adapter's tensors itself and does not call the modules that show them, so a "
            "hook of such a module does not run when the layer is called; register it on the layer",
            stacklevel=2,
        )
        return register(*args, **kwargs)

    return registered


class TensorView(nn.Module):
    """A module without tensors of its own: those that it shows are adapters'."""

    _parameters: Any = _table_of_adapters("_parameters")
    _buffers: Any = _table_of_adapters("_buffers")
    is_no_part_of_the_base = True

    def tensor_names(self) -> Iterable[str]:
        """Return the names of the tensors in this module."""
        raise NotImplementedError

    def place(self, name: str) -> tuple[nn.Module, str]:
        """Return the module that holds a tensor, and the tensor's name there."""
        raise NotImplementedError

    def adapter_of(self, name: str) -> Adapter:
        """Return the adapter that a tensor belongs to."""
        raise NotImplementedError

    @property
    def _non_persistent_buffers_set(self) -> set[str]:
        places = ((name, *self.place(name)) for name in self.tensor_names())
        return {name for name, module, own in places if own in module._non_persistent_buffers_set}

    @_non_persistent_buffers_set.setter
    def _non_persistent_buffers_set(self, value: set[str]) -> None:  # type: ignore[override]
        """Ignore the empty set that nn.Module makes for itself."""

    def put(self, name: str, tensor: Tensor) -> None:
        """Put a tensor into the place of another one; one that is no parameter comes from FSDP version 1."""
        module, own = self.place(name)
        setattr(module, own, tensor)
        self.adapter_of(name).mark_changed()

    def __delattr__(self, name: str) -> None:
        if name not in self.tensor_names():
            super().__delattr__(name)
            return
        module, own = self.place(name)
        vars(self)["_taken_away"] = (name, weakref.ref(getattr(module, own)))
        delattr(module, own)
        self.adapter_of(name).mark_changed()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        for name in self.tensor_names():
            self.adapter_of(name).mark_changed()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in self.tensor_names():
            if (saved := state_dict.get(f"{prefix}{name}")) is not None:
                module, own = self.place(name)
                self.adapter_of(name).before_load(module, own, saved)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @property
    def _hf_hook(self) -> Any:
        raise AttributeError("accelerate's hooks have no effect here")

    @_hf_hook.setter
    def _hf_hook(self, hook: Any) -> None:
        """Bring back what accelerate has just offloaded: the layer reads its adapters without calling this module."""
        if (part := offloading(hook)) is not None:
            part.pre_forward(self)

    register_forward_hook = _warned(nn.Module.register_forward_hook)
    register_forward_pre_hook = _warned(nn.Module.register_forward_pre_hook)
    register_full_backward_hook = _warned(nn.Module.register_full_backward_hook)
    register_full_backward_pre_hook = _warned(nn.Module.register_full_backward_pre_hook)


class FactorView(TensorView):
    """A module with tensors of one adapter, such as `weight` and `bias`.

    Args:
        adapter: the adapter that holds the tensors.
        names: {name in this module: the tensor's name in the adapter}; "0.weight" is in a module inside of this one.
    """

    weight: Tensor
    bias: Tensor | None
    _of_adapter: tuple[Adapter, Mapping[str, str]]
    _computed: set[str]
    """Names of tensors that the adapter computes, as that of a tied weight does; they cannot be assigned."""

    def __init__(self, adapter: Adapter, names: Mapping[str, str]):
        attributes = vars(self)
        attributes["_of_adapter"] = (adapter, names)  # in a tuple: no submodule
        places = ((name, *self.place(name)) for name in names)
        attributes["_computed"] = {name for name, module, own in places if not _has(module, own)}
        nn.Module.__init__(self)  # not that of nn.Linear, which would make parameters
        inside: dict[str, dict[str, str]] = {}
        for name, full in names.items():
            child, _, rest = name.partition(".")
            if rest:
                inside.setdefault(child, {})[rest] = full
        for child, below in inside.items():
            self._modules[child] = FactorView(adapter, below)

    def _module(self) -> nn.Module | None:
        """Return the adapter's module that has the same tensors; None if the adapter itself has them."""
        adapter, names = self._of_adapter
        name, full = next(iter(names.items()))
        return adapter.get_submodule(full.removesuffix(f".{name}")) if full.endswith(f".{name}") else None

    @property
    def __class__(self) -> Any:  # type: ignore[override]
        """The class of the adapter's module that has the same tensors, for `isinstance`; else the own class."""
        module = None if "_of_adapter" not in vars(self) else self._module()
        return type(self) if module is None else type(module)

    @property
    def names(self) -> Mapping[str, str]:
        """{name in this module: the tensor's name in the adapter}."""
        return self._of_adapter[1]

    @property
    def training(self) -> bool:
        """The training mode of the adapter, or of its module that has the same tensors."""
        return (self._module() or self._of_adapter[0]).training

    @training.setter
    def training(self, mode: bool) -> None:  # type: ignore[override]
        if "_modules" not in vars(self):  # nn.Module.__init__ sets it
            return
        module = self._module() or self._of_adapter[0]
        if module.training != mode:
            module.training = mode

    def tensor_names(self) -> Iterable[str]:
        """Return the names of the tensors in this module."""
        return [name for name in self._of_adapter[1] if "." not in name and name not in self._computed]

    def place(self, name: str) -> tuple[nn.Module, str]:
        """Return the module that holds a tensor, and the tensor's name there."""
        adapter, names = self._of_adapter
        path, _, own = names[name].rpartition(".")
        return adapter.get_submodule(path), own

    def adapter_of(self, name: str) -> Adapter:
        """Return the adapter."""
        return self._of_adapter[0]

    def __getattr__(self, name: str) -> Any:
        adapter, names = self._of_adapter
        if name in self._computed:
            return adapter.shown_parameter(names[name])
        if name in names:
            return getattr(*self.place(name))
        if name == "bias":
            return None
        if name in ("in_features", "out_features") and "weight" in names and self.weight.dim() == 2:
            return self.weight.shape[name == "in_features"]
        if name in vars(self).get("_modules", ()):
            return self._modules[name]
        if (module := self._module()) is not None:
            return getattr(module, name)
        raise AttributeError(f"this view of an adapter's tensors has {sorted(names)}, not {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        names = self._of_adapter[1]
        if name == "__class__":
            self._refuse_parametrisation()
        if name not in names:
            if isinstance(value, Tensor | nn.Module):
                raise AttributeError(f"this view of an adapter's tensors has {sorted(names)}, not {name!r}")
            object.__setattr__(self, name, value)
            return
        if name in self._computed:
            raise PeftError(f"{name} is that of the tied embedding's adapter; assign it there")
        shown = self._parameters.get(name)  # FSDP version 1 takes it away before it puts another one there
        if shown is not None and (not isinstance(value, nn.Parameter) or value.shape != shown.shape):
            raise ConfigError(
                f"{name} of an adapter must be an nn.Parameter of shape {tuple(shown.shape)}; got "
                f"{type(value).__name__} of shape {tuple(getattr(value, 'shape', ()))}"
            )
        self.put(name, value)

    def _refuse_parametrisation(self) -> NoReturn:
        """Put back the tensor that `torch.nn.utils.parametrize` has taken away, and raise PeftError."""
        name, taken = vars(self).get("_taken_away", ("", lambda: None))
        if (tensor := taken()) is not None:
            self.put(name, tensor)
        raise PeftError("an adapter's tensors cannot be parametrised; choose a method that has the form, such as DoRA")

    def __len__(self) -> int:
        """Return the number of modules or parameters, if this is a list of them."""
        return len({name.split(".")[0] for name in self._of_adapter[1] if name.split(".")[0].isdigit()})

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, number: int) -> "FactorView | Tensor":
        """Return one module of a list of modules, or one parameter of a list of parameters."""
        if not 0 <= number < len(self):
            raise IndexError(f"this view of an adapter's parameters has {len(self)} elements; got {number}")
        return getattr(self, str(number))

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., in_features) times the transposed weight (out_features, in_features), plus the bias.

        Raises:
            PeftError: the weight is not a matrix.
        """
        if self.weight.dim() != 2:
            raise PeftError("this view of an adapter's parameters can only be called for a matrix; call the layer")
        return F.linear(x, self.weight, self.bias)

    def __reduce_ex__(self, protocol: Any) -> Any:  # a copy of this module alone has tensors of its own
        own = {name: getattr(self, name) for name in self._of_adapter[1] if "." not in name}
        return _copied, (own, dict(self._modules), self.training)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Put a parameter into the place of the one that this module has."""
        setattr(self, name, param)

    def _replicate_for_data_parallel(self) -> nn.Module:
        return nn.Module()

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise PeftError("this module shows an adapter's tensors, so further members of it would have no effect")

    register_buffer = register_module = add_module = _refuse


class LinearView(FactorView, nn.Linear):  # type: ignore[override]
    """A factor of LoRA, such as `layer.lora_A["default"]`: an nn.Linear, as in HF PEFT."""


def factor_view(adapter: Adapter, attribute: str, names: Mapping[str, str]) -> FactorView:
    """Return the module that HF PEFT's layer has for an adapter.

    Args:
        adapter: the adapter.
        attribute: the attribute of HF PEFT's layer that holds the module, such as "lora_A".
        names: {name in the module: the tensor's name in the adapter}.
    """
    is_linear = attribute in ("lora_A", "lora_B") and adapter.shown_parameter(names["weight"]).dim() == 2
    return (LinearView if is_linear else FactorView)(adapter, names)


def _has(module: nn.Module, name: str) -> bool:
    """Return True if a module has a tensor; with FSDP version 1 it may be a plain attribute."""
    return any(table.get(name) is not None for table in (module._parameters, module._buffers, vars(module)))


def _copied(tensors: dict[str, Tensor], modules: dict[str, nn.Module], training: bool) -> nn.Module:
    """Return a plain module with parameters and modules of its own, an nn.Linear if they fit one."""
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if weight is not None and weight.dim() == 2 and tensors.keys() <= {"weight", "bias"}:
        out_features, in_features = weight.shape
        module: nn.Module = nn.Linear(in_features, out_features, bias is not None, device=torch.device("meta"))
    else:
        module = nn.Module()
    for name, tensor in tensors.items():
        module._parameters[name] = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
    module._modules.update(modules)
    return module.train(training)
