"""Attributes of HF PEFT's models: `base_model`, `model`, `prefix`, tensors and methods of `base_model`."""

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import partial, wraps
from typing import Any

from torch import Tensor
from torch.compiler import is_compiling

from peftcore.injection.adapter_set import ATTRIBUTE, adapter_set
from peftcore.injection.base_view import view_of
from peftcore.injection.tuner_model import SHARED_TENSORS, SharedTensors, tuner_model
from peftcore.injection.tuner_models import XLoraModel  # the import defines the class of every method

_BASE_MODEL_READERS = (
    "get_decoder",
    "get_encoder",
    "get_input_embeddings",
    "set_decoder",
    "set_encoder",
    "set_input_embeddings",
)
"""Methods of transformers that read `base_model` and mean the model without its head."""
_METHODS_OF_VIEWS = (
    "get_nb_savable_parameters",
    "print_savable_parameters",
    "resize_modules_by_rank_pattern",
    "resize_state_dict_by_rank_pattern",
    "update_and_allocate",
    *(name for name, own in vars(XLoraModel).items() if callable(own)),
)
"""Methods of `base_model` that scripts also call on the model."""
_OWN_BASE_MODEL: ContextVar[bool] = ContextVar("peftcore_own_base_model", default=False)
"""True while `base_model` is that of the model's own class."""


def attributes_of(plain: Any) -> dict[str, Any]:
    """Return {name: attribute} of the class of a model with adapters.

    Args:
        plain: the model's own class. Its methods of the same names are wrapped, and its attributes stay.
    """
    readers = {name: _with_own_base_model(plain, name) for name in _BASE_MODEL_READERS if hasattr(plain, name)}
    further = {one.name: one for one in _FROM_ADAPTERS if not hasattr(plain, one.name)}
    return {**readers, **further, "base_model": property(_base_model_of(plain))}


class BaseModelView:
    """`model` of PEFT's models, the base model: here a view; see `peftcore.injection.base_view`.

    Args:
        class_of_view: function that returns the class of the view.
    """

    def __init__(self, class_of_view: Callable[[], type]):
        self._class_of_view = class_of_view

    def __get__(self, model: Any, owner: type) -> Any:
        if model is None:
            raise AttributeError("model")
        for tensors_or_modules in (model._parameters, model._buffers, model._modules):  # set after get_peft_model
            if "model" in tensors_or_modules:
                return tensors_or_modules["model"]
        adapters = model.__dict__.get(ATTRIBUTE)
        if adapters is None or adapters.selection.cache.calls or _OWN_BASE_MODEL.get() or is_compiling():
            raise AttributeError("model")  # code of the model itself asks whether it has such an attribute
        return view_of(model, self._class_of_view())


def _shared(model: Any, name: str) -> Mapping[str, Tensor] | None:
    tensors = SharedTensors(model, name) if ATTRIBUTE in model.__dict__ else None
    return tensors or None


def _method_of_view(model: Any, name: str) -> Callable[..., Any] | None:
    view = tuner_model(model) if ATTRIBUTE in model.__dict__ else None
    return getattr(view, name) if hasattr(type(view), name) else None


def _word_embeddings(model: Any) -> Any:
    """Return the input embeddings of a model with a prompt; None without a prompt."""
    has_prompt = any(config.is_prompt_learning for config in adapter_set(model).configs.values())
    return getattr(model, "get_input_embeddings", lambda: None)() if has_prompt else None


class _FromAdapters:
    """An attribute of PEFT's models that follows from the adapters, unless the model itself has such an attribute.

    Args:
        name: the attribute's name.
        value: function of the model; None if its adapters do not have the attribute.
    """

    def __init__(self, name: str, value: Callable[[Any], Any]):
        self.name, self._value = name, value

    def __get__(self, model: Any, owner: type) -> Any:
        if model is None:
            raise AttributeError(self.name)
        for tensors_or_modules in (model._parameters, model._buffers, model._modules):
            if self.name in tensors_or_modules:
                return tensors_or_modules[self.name]
        value = self._value(model)
        if value is None:
            raise AttributeError(self.name)
        return value


_FROM_ADAPTERS = (
    _FromAdapters("prefix", lambda model: tuner_model(model).prefix),
    _FromAdapters("special_peft_forward_args", lambda model: {"adapter_names", "alora_offsets"}),
    _FromAdapters("word_embeddings", _word_embeddings),
    *(_FromAdapters(name, partial(_shared, name=name)) for name in SHARED_TENSORS),
    *(_FromAdapters(name, partial(_method_of_view, name=name)) for name in _METHODS_OF_VIEWS),
)
"""Attributes such as `prefix`, "lora_", `vera_A`, {adapter: matrix A of all layers}, and `update_and_allocate`."""


def _base_model_of(plain: Any) -> Any:
    """Return the getter of `base_model`: the view of PEFT, with the model as `base_model.model`."""

    def base_model(self: Any) -> Any:
        own = getattr(plain, "base_model", None)
        adapters = self.__dict__.get(ATTRIBUTE)
        # code inside of a forward pass, such as TRL's, means the model without its head, or the model's own module
        is_own = adapters is None or adapters.selection.cache.calls or _OWN_BASE_MODEL.get()
        for attributes in (self._modules, self.__dict__) if is_own or is_compiling() else ():
            if "base_model" in attributes:
                return attributes["base_model"]
        if own is not None and is_own:
            return own.__get__(self)
        return tuner_model(self)

    return base_model


def _with_own_base_model(plain: Any, name: str) -> Any:
    """Return a method of the class that reads `base_model` as transformers defines it."""
    own = getattr(plain, name)

    @wraps(own)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = _OWN_BASE_MODEL.set(True)
        try:
            return own(self, *args, **kwargs)
        finally:
            _OWN_BASE_MODEL.reset(token)

    return method
