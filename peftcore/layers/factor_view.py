"""The modules inside of HF PEFT's layers, such as `layer.lora_A["default"]`, as views on an adapter.

A view is a module that holds the adapter's own parameters. It is made at each access and is no submodule of the model.
So a change of the parameters is a change of the adapter, and hooks on a view would never run: they are refused.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.adapter import Adapter
from peftcore.errors import ConfigError, PeftError


class FactorView(nn.Module):
    """A module with parameters of an adapter, such as `weight` and `bias`.

    Args:
        adapter: the adapter that holds the parameters.
        parameters: {attribute: the parameter's name in the adapter}.
    """

    weight: Tensor
    bias: Tensor | None
    _of_adapter: tuple[Adapter, Mapping[str, str]]

    def __init__(self, adapter: Adapter, parameters: Mapping[str, str]):
        nn.Module.__init__(self)  # not that of nn.Linear, which would make parameters
        attributes = vars(self)
        attributes |= {"training": adapter.training, "_of_adapter": (adapter, parameters)}  # in a tuple: no submodule
        self._parameters["bias"] = None
        for name, full in parameters.items():
            shown = adapter.shown_parameter(full)
            if isinstance(shown, nn.Parameter):
                self._parameters[name] = shown
            else:  # computed, for the adapter of a tied weight
                self._parameters.pop(name, None)
                attributes[name] = shown
        if "weight" in parameters and self.weight.dim() == 2:
            attributes["out_features"], attributes["in_features"] = self.weight.shape

    def __setattr__(self, name: str, value: Any) -> None:
        adapter, parameters = self._of_adapter
        if name == "training":
            super().__setattr__(name, value)
            return
        if name not in parameters:
            raise AttributeError(f"this view of an adapter's parameters has {sorted(parameters)}, not {name!r}")
        shown = adapter.shown_parameter(parameters[name])
        if not isinstance(shown, nn.Parameter):
            raise PeftError(f"{name} is that of the tied embedding's adapter; assign it there")
        if not isinstance(value, nn.Parameter) or value.shape != shown.shape:
            raise ConfigError(
                f"{name} of an adapter must be an nn.Parameter of shape {tuple(shown.shape)}; got "
                f"{type(value).__name__} of shape {tuple(getattr(value, 'shape', ()))}"
            )
        path, _, leaf = parameters[name].rpartition(".")
        setattr(adapter.get_submodule(path), leaf, value)
        adapter.mark_changed()
        self._parameters[name] = value

    def __len__(self) -> int:
        """Return the number of modules or parameters, if this is a list of them."""
        return len({name.split(".")[0] for name in self._of_adapter[1] if name.split(".")[0].isdigit()})

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, number: int) -> "FactorView | Tensor":
        """Return one module of a list of modules, or one parameter of a list of parameters."""
        adapter, parameters = self._of_adapter
        if str(number) in parameters:
            return adapter.shown_parameter(parameters[str(number)])
        start = f"{number}."
        own = {name[len(start) :]: full for name, full in parameters.items() if name.startswith(start)}
        if not own:
            raise IndexError(f"this view of an adapter's parameters has {len(self)} elements; got {number}")
        return FactorView(adapter, own)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self._parameters)
        super()._apply(fn, recurse)
        for name, parameter in self._parameters.items():
            if parameter is not before[name]:
                setattr(self, name, parameter)
        self._of_adapter[0].mark_changed()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., in_features) times the transposed weight (out_features, in_features), plus the bias.

        Raises:
            PeftError: the weight is not a matrix.
        """
        if self.weight.dim() != 2:
            raise PeftError("this view of an adapter's parameters can only be called for a matrix; call the layer")
        return F.linear(x, self.weight, self.bias)

    def __reduce_ex__(self, protocol: Any) -> Any:  # a copy is a module of its own
        return _copied, ({name: getattr(self, name) for name in self._of_adapter[1]}, self.training)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise PeftError(
            "this module is a view of an adapter's parameters, made at each access, so hooks and further members of it "
            "would have no effect; register them on the layer"
        )

    register_forward_hook = register_forward_pre_hook = _refuse
    register_full_backward_hook = register_full_backward_pre_hook = register_backward_hook = _refuse
    register_parameter = register_buffer = register_module = add_module = _refuse


class LinearView(FactorView, nn.Linear):  # type: ignore[override]
    """A factor of LoRA, such as `layer.lora_A["default"]`: an nn.Linear, as in HF PEFT."""


def factor_view(adapter: Adapter, attribute: str, parameters: Mapping[str, str]) -> FactorView:
    """Return the module that HF PEFT's layer has for an adapter.

    Args:
        adapter: the adapter.
        attribute: the attribute of HF PEFT's layer that holds the module, such as "lora_A".
        parameters: {attribute of the module: the parameter's name in the adapter}.
    """
    is_linear = attribute in ("lora_A", "lora_B") and adapter.shown_parameter(parameters["weight"]).dim() == 2
    return (LinearView if is_linear else FactorView)(adapter, parameters)


def _copied(parameters: dict[str, Tensor], training: bool) -> nn.Module:
    """Return a plain module with parameters of its own, an nn.Linear if they fit one."""
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if weight is not None and weight.dim() == 2 and parameters.keys() <= {"weight", "bias"}:
        out_features, in_features = weight.shape
        module: nn.Module = nn.Linear(in_features, out_features, bias is not None, device=torch.device("meta"))
    else:
        module = nn.Module()
    for name, tensor in parameters.items():
        module._parameters[name] = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
    return module.train(training)
