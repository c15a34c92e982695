"""Detection of child layers whose weight a module reads without calling the layer.

An adapter on such a layer has no effect in the forward pass and changes the output once it is merged.
"""

import dis
import functools
import inspect
from collections.abc import Iterator
from itertools import chain
from types import CodeType, FunctionType
from typing import Any

from torch import nn

_CALLS_NONE = "WavLMAttention"
"""Class that calls only one small layer, which scales relative positions and is not worth an adapter."""
_CALLED_IF_QUANTIZED = {("FalconMambaMixer", "dt_proj"), ("JambaMambaMixer", "dt_proj")}
"""(class, child): the forward calls the child in a quantised model and reads its weight in any other model."""
_READ_BY_KERNEL = frozenset({"MambaMixer", "FalconMambaMixer", "JambaMambaMixer"})
"""Classes whose `x_proj` and `out_proj` the fused kernel `mamba_inner_fn` reads in training and never calls."""
_METADATA = {"dtype", "device", "shape", "data_ptr"}
"""Attributes of a weight that say nothing about its use."""
_NOT_USES = {"bias", "kernel_size", "stride", "padding", "dilation", "groups"} | {
    *("in_features", "out_features", "in_channels", "out_channels")
}
"""Attributes of a layer that say nothing about the use of its weight."""


def calls_layer(parent: nn.Module, name: str) -> bool:
    """Return True if a module calls its child `name`, or if another module may call the child.

    Args:
        parent: The module.
        name: The child's name in the module.

    Returns:
        False if the forward of the module's class, and the methods that it calls, use the child's weight and never
        the child itself.
    """
    classes = {base.__name__ for base in type(parent).__mro__}
    if any(base in classes and name == child for base, child in _CALLED_IF_QUANTIZED):
        return hasattr(getattr(parent, "config", None), "_is_quantized")
    return _CALLS_NONE not in classes and not _only_reads(type(parent), name)


def kernel_reads(parent: nn.Module, name: str) -> bool:
    """Return True if training on an accelerator may run a fused kernel that reads the child's weight.

    transformers 5.25 fetches such kernels by default, earlier versions use them if the package mamba-ssm is installed.
    With either, an adapter on the child would not be trained.

    Args:
        parent: The module.
        name: The child's name in the module.
    """
    if name not in ("x_proj", "out_proj") or not any(base.__name__ in _READ_BY_KERNEL for base in type(parent).__mro__):
        return False
    layer = parent.get_submodule(name)
    tensor = next(chain(layer.parameters(), layer.buffers()))  # GPTQ's weights are buffers
    return tensor.device.type not in ("cpu", "meta")


@functools.lru_cache(maxsize=1024)
def _only_reads(parent_class: type, name: str) -> bool:
    """Return True if a class's forward uses the weight of its child `name` and never the child itself."""
    functions = [f for f in _forward_functions(parent_class) if name in set(_names(f.__code__))]
    uses = {use for f in functions for use in _uses(f.__code__, f.__globals__, ("attribute", name))}
    return uses == {"weight"}


@functools.lru_cache(maxsize=1024)
def _forward_functions(parent_class: type) -> tuple[FunctionType, ...]:
    """Return a class's forward and the methods that it reaches, those of base classes included.

    Other methods say nothing about the forward: diffusers' attention concatenates weights in `fuse_projections`.
    """
    classes = [base for base in parent_class.__mro__ if base not in nn.Module.__mro__]
    reached, waiting, functions = {"forward"}, ["forward"], []
    while waiting:
        method = waiting.pop()
        for base in classes:
            function = _plain_function(vars(base).get(method))
            if function is not None:
                functions.append(function)
                called = set(_names(function.__code__)) - reached
                reached |= called
                waiting += called
    return tuple(functions)


def _plain_function(value: Any) -> FunctionType | None:
    """Return the Python function behind a value; None if there is none.

    With the package kernels, functions of transformers are modules whose forward calls the function `func`.
    """
    if isinstance(value, nn.Module):
        forward = type(value).forward
        value = inspect.getclosurevars(forward).nonlocals.get("func") if isinstance(forward, FunctionType) else None
    function = inspect.unwrap(value) if callable(value) else None
    return function if isinstance(function, FunctionType) else None


def _names(code: CodeType) -> Iterator[str]:
    """Yield the names of attributes and globals that code uses, those of inner functions included."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)


def _uses(
    code: CodeType, namespace: dict[str, Any], value: tuple[str, str], callers: frozenset[CodeType] = frozenset()
) -> Iterator[str]:
    """Yield how code uses a layer: "weight" for the values of its weight, "layer" for anything else.

    Reads of the bias, of sizes, and of metadata such as the weight's dtype are left out. A layer that is the first
    argument of a call is used as the called function uses its first parameter.

    Args:
        code: The code, with that of its inner functions.
        namespace: The code's global variables.
        value: What the layer is in the code: an ("attribute", name) of any object or a ("local", name) variable.
        callers: Code that called this code with the layer.
    """
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _uses(inner, namespace, value, callers)
    steps = [("", None), ("", None), *_steps(code), ("", None), ("", None)]
    for index, step in enumerate(steps):
        if step == ("method", value[1]):
            yield "layer"
        if step != value:
            continue
        following, last = steps[index + 1 : index + 3]
        if following == ("attribute", "weight"):
            if last[1] not in _METADATA:
                yield "weight"
        elif following[1] not in _NOT_USES:
            # the object of an attribute is loaded just before the attribute
            before = steps[index - (2 if value[0] == "attribute" else 1)]
            is_argument = before[0] == "global" and following[0] not in ("attribute", "method", "called")
            function = _plain_function(namespace.get(before[1])) if is_argument else None
            if function is None or not function.__code__.co_argcount or function.__code__ in callers:
                yield "layer"
            else:
                parameter = ("local", function.__code__.co_varnames[0])
                yield from _uses(function.__code__, function.__globals__, parameter, callers | {code})


def _steps(code: CodeType) -> Iterator[tuple[str, Any]]:
    """Yield (kind, name) of code's instructions.

    The kinds are "attribute"; "method", for an attribute that is called; "local"; "global"; "called", for the mark of a
    call of the value before it; and "" for all others.
    """
    for step in dis.get_instructions(code):
        if step.opname == "LOAD_METHOD" or (step.opname == "LOAD_ATTR" and "NULL|self" in step.argrepr):
            yield "method", step.argval
        elif step.opname == "LOAD_ATTR":
            yield "attribute", step.argval
        elif step.opname == "LOAD_GLOBAL":
            yield "global", step.argval
        elif "LOAD_FAST" in step.opname or step.opname == "LOAD_DEREF":
            # Python 3.13 has instructions for two variables: of STORE_FAST_LOAD_FAST only the second is loaded
            names = step.argval if isinstance(step.argval, tuple) else (step.argval,)
            yield from (("local", name) for name in names[step.opname.startswith("STORE") :])
        elif step.opname == "PUSH_NULL":
            yield "called", None
        elif step.opname != "CACHE":
            yield "", None
