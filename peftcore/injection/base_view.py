"""`peft_model.model` as in HF PEFT, where it is the base model.

In HF PEFT a `PeftModel` holds the base model. So scripts write `peft_model.model.lin0` for a plain PyTorch model, and
`peft_model.model.model.layers` for a transformers model that calls the model without its head `model`. Here the model
is not wrapped. These scripts get a view: a second object that shares all attributes of the model object, and whose
class has no attribute `model`. So a loop such as `while hasattr(m, "model"): m = m.model` ends.

If the model has an attribute `model` of its own, `peft_model.model` stays that attribute, because transformers reads
it. Its attribute `model` is then the view, and `peft_model.model.lm_head` does not exist. `peft_model.base_model.model`
is the base model in every case.
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


def show_model(module: nn.Module) -> None:
    """Give a module the attribute `model`, a view on the module itself, unless the module has one.

    Args:
        module: the module; only its class changes.
    """
    if not hasattr(module, "model"):
        module.__class__ = _with_model(type(module))


def hide_model(module: nn.Module) -> None:
    """Undo `show_model`.

    Args:
        module: the module; not changed if its class was changed after `show_model`.
    """
    plain = type(module).__bases__[0]
    if type(module) is _with_model(plain):
        module.__class__ = plain


@cache
def _with_model(plain: type[Any]) -> type[Any]:
    """Return a subclass of the same name with the attribute `model`."""

    def model(self: Any) -> Any:
        return view_of(self, plain)

    def reduce(self: Any, protocol: Any) -> Any:  # the class is made at run time, so a pickle stores the plain class
        return _unpickled, (plain,), self.__dict__

    members = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    members |= {"model": property(model), "__reduce_ex__": reduce}
    if hasattr(plain, "base_model"):  # transformers looks for the attribute `model` there
        members["base_model"] = property(lambda self: self)
    return type(plain.__name__, (plain,), members)


def _unpickled(plain: type[Any]) -> Any:
    return object.__new__(_with_model(plain))
