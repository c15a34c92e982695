"""`peft_model.model` as in HF PEFT, where it is the base model.

In HF PEFT a `PeftModel` holds the base model. So scripts write `peft_model.model.lin0` for a plain PyTorch model, and
`peft_model.model.model.layers` for a transformers model that calls the model without its head `model`. Here the model
is not wrapped. These scripts get a view: a second object that shares all attributes of the model object, and whose
class has no attribute `model`. So a loop such as `while hasattr(m, "model"): m = m.model` ends.

If the model has an attribute `model` of its own, `peft_model.model` stays that attribute, because transformers reads
it. Its attribute `model` is then the view. What only the whole model has, such as `lm_head`, `generate` and attributes
that a script has set, is an attribute of it, too. A call of it returns hidden states; `peft_model.base_model.model` is
the base model in every case.
"""

from functools import cache
from typing import Any

from torch import nn


def view_of(module: nn.Module, kind: type[Any]) -> Any:
    """Return a second object that shares the attributes of a module: setting an attribute of one sets both.

    Args:
        module: the module.
        kind: the class of the second object.
    """
    view = object.__new__(kind)
    object.__setattr__(view, "__dict__", module.__dict__)
    return view


def show_model(module: nn.Module, whole: nn.Module | None = None) -> None:
    """Give a module the attribute `model`, a view on the module itself, unless the module has one.

    Args:
        module: the module; only its class changes, and it refers to `whole`.
        whole: the model that contains the module. Its other submodules, and the public attributes that it and its class
            have now, become attributes of the module, unless the module has such an attribute.
    """
    if hasattr(module, "model"):
        return
    names: set[str] = set()
    if whole is not None:
        names = {name for name in (*whole._modules, *vars(whole), *dir(type(whole))) if not name.startswith("_")}
        names -= {"model", *dir(module)}
        vars(module)[_WHOLE] = whole
    module.__class__ = _with_model(type(module), tuple(sorted(names)))


def hide_model(module: nn.Module) -> None:
    """Undo `show_model`.

    Args:
        module: the module; not changed if its class was changed after `show_model`.
    """
    kind = type(module)
    if vars(kind).get("shows_model"):
        module.__class__ = kind.__bases__[0]
        vars(module).pop(_WHOLE, None)


_WHOLE = "_whole_model"
"""Attribute of a module that holds the model of which submodules and methods are shown."""


@cache
def _with_model(plain: type[Any], names: tuple[str, ...] = ()) -> type[Any]:
    """Return a subclass of the same name with the attribute `model`, and with attributes of the whole model."""

    def model(self: Any) -> Any:
        return view_of(self, plain)

    def reduce(self: Any, protocol: Any) -> Any:  # the class is made at run time, so a pickle stores the plain class
        return _unpickled, (plain, names), self.__dict__

    def set_attribute(self: Any, name: str, value: Any) -> None:
        target = vars(self)[_WHOLE] if name in names else super(kind, self)
        target.__setattr__(name, value)

    members = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    members |= {"shows_model": True, "model": property(model), "__reduce_ex__": reduce}
    if names:
        members |= {name: _of_whole(name) for name in names} | {"__setattr__": set_attribute}
    if hasattr(plain, "base_model"):  # transformers looks for the attribute `model` there
        members["base_model"] = property(lambda self: self)
    kind = type(plain.__name__, (plain,), members)
    return kind


def _of_whole(name: str) -> property:
    """Return the attribute of a module that is the whole model's attribute."""
    return property(lambda self: getattr(vars(self)[_WHOLE], name))


def _unpickled(plain: type[Any], names: tuple[str, ...] = ()) -> Any:
    return object.__new__(_with_model(plain, names))
