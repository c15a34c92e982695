"""Detection of child layers whose weight a module reads without calling the layer.

An adapter on such a layer has no effect in the forward pass and changes the output once it is merged.
"""

import dis
import functools
import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType

from torch import nn

_CALLS_NONE = "WavLMAttention"
"""Class that calls only one small layer, which scales relative positions and is not worth an adapter."""
_CALLED_IF_QUANTIZED = {("FalconMambaMixer", "dt_proj"), ("JambaMambaMixer", "dt_proj")}
"""(class, child): the forward calls the child in a quantised model and reads its weight in any other model."""
_TENSORS = {"weight", "bias"}
_METADATA = {"dtype", "device", "shape", "data_ptr"}
"""Attributes of a weight that say nothing about its use."""


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


@functools.lru_cache(maxsize=1024)
def _only_reads(parent_class: type, name: str) -> bool:
    """Return True if a class's forward uses the weight of its child `name` and never the child itself."""
    return {use for code in _forward_code(parent_class) for use in _uses(code, name)} == {"weight"}


@functools.lru_cache(maxsize=1024)
def _forward_code(parent_class: type) -> tuple[CodeType, ...]:
    """Return the code of a class's forward and of the methods that it reaches, those of base classes included.

    Other methods say nothing about the forward: diffusers' attention concatenates weights in `fuse_projections`.
    """
    classes = [base for base in parent_class.__mro__ if base not in nn.Module.__mro__]
    reached, waiting, codes = {"forward"}, ["forward"], []
    while waiting:
        method = waiting.pop()
        for base in classes:
            attribute = vars(base).get(method)
            function = inspect.unwrap(attribute) if callable(attribute) else None
            if isinstance(function, FunctionType):
                codes.append(function.__code__)
                called = set(_names(function.__code__)) - reached
                reached |= called
                waiting += called
    return tuple(codes)


def _names(code: CodeType) -> Iterator[str]:
    """Yield the names of attributes and globals that code uses, those of inner functions included."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)


def _uses(code: CodeType, name: str) -> Iterator[str]:
    """Yield how code uses an attribute of this name: "weight" for the values of its weight, "layer" for anything else.

    Reads of the bias, and of metadata such as the weight's dtype, are left out.
    """
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _uses(inner, name)
    if name not in code.co_names:
        return
    steps = [(step.opname in ("LOAD_ATTR", "LOAD_METHOD"), step.argval) for step in dis.get_instructions(code)]
    steps += [(False, None)] * 2
    for (is_read, attribute), following, last in zip(steps, steps[1:], steps[2:], strict=False):
        if not is_read or attribute != name:
            continue
        if not following[0] or following[1] not in _TENSORS:
            yield "layer"
        elif following[1] == "weight" and not (last[0] and last[1] in _METADATA):
            yield "weight"
