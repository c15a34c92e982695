"""What a call of the whole model tells its adapters: one forward pre-hook, installed with the first adapter.

A hook and not an overridden `forward`, because accelerate and others replace `forward` on the instance.
"""

import contextlib
import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from peftcore.adapter_set import ATTRIBUTE, AdapterSet
from peftcore.errors import ConfigError
from peftcore.fast_path import forget
from peftcore.prompts.learner import is_encoder_decoder


def install(model: nn.Module) -> None:
    """Have acting adapters told of each forward of `model`."""
    model.register_forward_pre_hook(_before_forward, with_kwargs=True)


def install_prompts(model: Any, adapters: AdapterSet) -> None:
    """Have prompt learners told of outputs too, and of the encoder, which `generate` calls without the model."""
    model.register_forward_hook(_after_forward)
    if is_encoder_decoder(model):
        model.get_encoder().register_forward_pre_hook(partial(_before_encoder, adapters), with_kwargs=True)


def remove(model: nn.Module) -> None:
    """Undo `install`."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if hook is _before_forward:
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)


def remove_prompts(model: Any) -> None:
    """Undo `install_prompts`."""
    for key, hook in list(model._forward_hooks.items()):
        if hook is _after_forward:
            del model._forward_hooks[key]
    if is_encoder_decoder(model):
        encoder = model.get_encoder()
        for key, hook in list(encoder._forward_pre_hooks.items()):
            if isinstance(hook, partial) and hook.func is _before_encoder:
                del encoder._forward_pre_hooks[key]
                encoder._forward_pre_hooks_with_kwargs.pop(key, None)


def _before_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    adapters: AdapterSet | None = model.__dict__.get(ATTRIBUTE)
    if adapters is None:
        return None
    if adapters.selection.waiting:
        forget(adapters.selection.waiting)
    if not adapters.listening:
        return None
    args, inputs = _by_name(model, args, kwargs)
    inputs = {**adapters.generating, **inputs}
    taken = frozenset().union(*adapters.listening.values())
    for key in taken & inputs.keys():
        inputs[key] = _for_each_row(inputs[key], inputs)
    adapters.passing = {key: inputs[key] for key in taken & inputs.keys()}
    _tell(model, adapters, list(adapters.listening), inputs)
    for learner in adapters.acting_prompts():  # last, because others may look for words in the text
        learner.before_forward(model, inputs)
    return args, {key: value for key, value in inputs.items() if key not in taken}


def _tell(model: nn.Module, adapters: AdapterSet, names: list[str], inputs: dict[str, Any]) -> None:
    for name in names:
        if name in adapters.selection.acting and name not in adapters.prompts:
            config = adapters.configs[name]
            adapters.kinds[name].before_forward(config, adapters.of_method(name), model, inputs)


def _before_encoder(
    adapters: AdapterSet, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    learners = adapters.acting_prompts()
    if not learners:
        return None
    for_adapters = {**adapters.passing, **adapters.generating}
    args, inputs = _by_name(encoder, args, kwargs)
    inputs = {**for_adapters, **inputs}
    for learner in learners:
        learner.before_encoder(encoder, inputs)
    return args, {key: value for key, value in inputs.items() if key not in for_adapters}


def _after_forward(model: nn.Module, _args: Any, outputs: Any) -> Any:
    adapters: AdapterSet | None = model.__dict__.get(ATTRIBUTE)
    if adapters is None:
        return None
    adapters.passing = {}
    for learner in adapters.acting_prompts():
        outputs = learner.after_forward(outputs)
    return outputs


def _by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call by name; those of a forward that takes any number of them stay in order."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return args, dict(kwargs)
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.POSITIONAL_ONLY)]
    return (), {**dict(zip(names, args, strict=False)), **kwargs}


def _for_each_row(value: Any, inputs: dict[str, Any]) -> Any:
    """A value given for each row of a batch, repeated for the beams that `generate` makes of a row."""
    tokens = next((inputs[k] for k in ("input_ids", "inputs_embeds") if inputs.get(k) is not None), None)
    if not isinstance(value, torch.Tensor) or tokens is None or not value.dim() or len(tokens) % len(value):
        return value
    return value.repeat_interleave(len(tokens) // len(value), dim=0)


@contextlib.contextmanager
def generation(model: nn.Module, given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Gives `given`, the arguments of `generate`, without those that belong to adapters; these hold while inside."""
    adapters: AdapterSet = model.__dict__[ATTRIBUTE]
    taken = frozenset().union(*adapters.listening.values())
    _check_cache(adapters, given)
    before = adapters.generating
    adapters.generating = {key: value for key, value in given.items() if key in taken}
    kinds = (adapters.kinds[name] for name in adapters.selection.acting)
    fixed = {key: value for kind in kinds for key, value in kind.generate_arguments.items()}
    try:  # an encoder runs by itself, before the first forward of the model
        told = [name for name, own in adapters.listening.items() if own & given.keys()]
        _tell(model, adapters, told, dict(adapters.generating))
        yield {**{key: value for key, value in given.items() if key not in taken}, **fixed}
    finally:
        adapters.generating = before


def _check_cache(adapters: AdapterSet, given: dict[str, Any]) -> None:
    cache = given.get("cache", given.get("past_key_values"))
    feeding = any(learner.exclusive for learner in adapters.acting_prompts())
    if feeding and cache is not None and cache.get_seq_length():
        raise ConfigError(
            "generate counts a cache's entries as tokens of the text, and a prompt is among them; "
            "give it the whole text and no cache, or an empty one"
        )
