"""Hooks on the whole model: before each forward pass they prepare routes, prompts and methods that need its arguments.

The hooks are installed with the first adapter. They also mark the beginning and the end of a call, between which layers
share outputs, and record the call for activation checkpointing. They are hooks and not an overridden `forward`, because
accelerate and others replace `forward` on the instance.

"Adapter arguments" are arguments of the model's call for adapters, such as `task_ids` (`Adapter.forward_arguments`).
"""

import contextlib
import inspect
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peftcore._util.per_thread import values_of
from peftcore.adapter import Adapter
from peftcore.composition.route import Route
from peftcore.errors import ConfigError, RoutingError
from peftcore.injection.adapter_set import ATTRIBUTE, AdapterSet, shared_by
from peftcore.injection.targets import NO_TARGETS
from peftcore.layers.active import in_compiled_call
from peftcore.layers.forward_paths import contiguous_input
from peftcore.layers.wrapper import unwrapped
from peftcore.prompts.cache import is_empty
from peftcore.prompts.learner import PromptLearner, is_encoder_decoder
from peftcore.prompts.mixed import mixed_learners

_TEXTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


def install(model: nn.Module) -> None:
    """Install the hooks on the model and on its output head."""
    model.register_forward_pre_hook(_before_forward, with_kwargs=True)
    model.register_forward_hook(_end_call, always_call=True)
    if (head := _head(model)) is not None and contiguous_input not in head._forward_pre_hooks.values():
        head.register_forward_pre_hook(contiguous_input)


def _head(model: nn.Module) -> nn.Module | None:
    """Return the linear output head of a transformers model; None if there is none."""
    try:
        head = unwrapped(model.get_output_embeddings())  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return head if isinstance(head, nn.Linear) else None


def install_prompts(model: Any, adapters: AdapterSet) -> None:
    """Install the hooks of prompt learners: on the outputs, and on the encoder, which `generate` calls by itself.

    Args:
        model: the model.
        adapters: its adapters.
    """
    model.register_forward_hook(_after_forward)
    if is_encoder_decoder(model):
        model.get_encoder().register_forward_pre_hook(partial(_before_encoder, adapters), with_kwargs=True)


def remove(model: nn.Module) -> None:
    """Undo `install`."""
    if (head := _head(model)) is not None:
        for key, hook in list(head._forward_pre_hooks.items()):
            if hook is contiguous_input:
                del head._forward_pre_hooks[key]
    for key, hook in list(model._forward_pre_hooks.items()):
        if hook is _before_forward:
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
    for key, hook in list(model._forward_hooks.items()):
        if hook is _end_call:
            del model._forward_hooks[key]
            model._forward_hooks_always_called.pop(key, None)


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
    selection = adapters.selection
    route, values = selection.route, {}
    changed = None
    if route is not None or adapters.forward_arguments:
        changed, values = _prepare_call(model, adapters, route, args, kwargs)
    if not in_compiled_call():
        selection.begin_call(values, sys._getframe(1))
    _check_weights_are_here(adapters, route)  # last, because no other thread exchanges the weights of a running call
    return changed


def needs_call(model: nn.Module, arguments: dict[str, Any]) -> bool:
    """Return True if `model.forward` was called directly, without hooks, and adapters need the hooks.

    Args:
        model: the model.
        arguments: the keyword arguments of `forward`.
    """
    adapters: AdapterSet | None = model.__dict__.get(ATTRIBUTE)
    if adapters is None or in_compiled_call() or adapters.selection.cache.calls:
        return False
    if "adapter_names" in arguments or adapters.selection.route is not None:
        return True
    return any(name in adapters.forward_arguments for name in adapters.selection.in_effect_anywhere)


def _end_call(model: nn.Module, _args: Any, outputs: Any) -> None:
    adapters: AdapterSet | None = model.__dict__.get(ATTRIBUTE)
    if adapters is None:
        return
    if not in_compiled_call():
        adapters.selection.end_call(outputs)
    if isinstance(getattr(outputs, "loss", None), Tensor):
        _add_regularizers(adapters, outputs)


def _add_regularizers(adapters: AdapterSet, outputs: Any) -> None:
    """Add to the model's loss the regularisers of active adapters that train, if the method says so."""
    if not adapters.regularizes_model_loss or adapters.selection.route is not None:
        return
    for name in adapters.selection.active:
        kind = adapters.kinds[name]
        if issubclass(kind, Adapter) and kind.regularizes_model_loss and name in adapters.trainable:
            term = kind.regularizer(adapters.configs[name], adapters.of_method(name))
            if term is not None:
                outputs.loss = outputs.loss + term.to(outputs.loss)


@contextlib.contextmanager
def without_regularizers(model: nn.Module) -> Iterator[None]:
    """Let a model return the loss of its task alone inside of the context; a model without adapters does so anyway."""
    adapters: AdapterSet | None = model.__dict__.get(ATTRIBUTE)
    if adapters is None:
        yield
        return
    before, adapters.regularizes_model_loss = adapters.regularizes_model_loss, False
    try:
        yield
    finally:
        adapters.regularizes_model_loss = before


def _check_weights_are_here(adapters: AdapterSet, route: Route | None) -> None:
    """Raise RoutingError if another thread has put the unmerged weights in place (`disable_adapter`)."""
    if adapters.unmerged_by and adapters.merged and not (route is not None and route.is_final):
        raise RoutingError(
            f"{list(adapters.merged)} are merged, and another thread is inside of disable_adapter(), which has put the "
            "unmerged weights in place for all threads; call unmerge_adapter() first, then each thread has its own "
            "adapters"
        )


def _prepare_call(
    model: nn.Module, adapters: AdapterSet, route: Route | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[tuple[Any, ...], dict[str, Any]], dict[Any, dict[str, Any]]]:
    """Prepare route, methods and prompts for a call: (its arguments for the model, values of the adapter arguments)."""
    args, inputs = _by_name(model, args, kwargs)
    inputs = {**adapters.generate_arguments, **inputs}
    names = frozenset().union(*adapters.forward_arguments.values())
    for key in names & inputs.keys():
        inputs[key] = _for_each_row(inputs[key], inputs)
    adapters.call_arguments = {key: inputs[key] for key in names & inputs.keys()}
    if route is not None:
        _begin(route, args, inputs)
    values = _prepare_methods(model, adapters, list(adapters.forward_arguments), inputs)
    learners = _prompts(adapters, is_encoder_decoder(model))
    _check_positions(learners)
    for learner in learners:  # last, because methods may search the text
        learner.before_forward(model, inputs)
        if not (learner.exclusive or torch.compiler.is_compiling()):
            values[learner] = values_of(learner)
    if route is not None:
        route.flattened = _flattened(args, inputs)
    return (args, {key: value for key, value in inputs.items() if key not in names}), values


def _begin(route: Route, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
    """Set the route's rows and positions for a forward pass."""
    texts = [inputs[key] for key in _TEXTS if inputs.get(key) is not None]
    first = next((value for value in (*texts, *args, *inputs.values()) if _has_rows(value)), None)
    if first is None:
        if route.uniform is None or route.needs_positions:
            raise RoutingError(
                "the model is called without a tensor among its arguments, so its rows cannot be counted; give all "
                "rows of a batch the same composition without Split, or give the model the batch as a tensor"
            )
        route.rows = None
        return
    route.begin(len(first), _positions(first, inputs) if route.needs_positions else None)


def _flattened(args: tuple[Any, ...], inputs: dict[str, Any]) -> frozenset[int]:
    """Return the token counts B·T of the texts among the arguments, by which a layer recognises a flattened batch."""
    texts = [inputs[key] for key in _TEXTS if inputs.get(key) is not None]
    others = [value for value in (*args, *inputs.values()) if isinstance(value, Tensor) and value.dim() > 2]
    return frozenset(value.shape[0] * value.shape[1] for value in (*texts, *others) if value.dim() > 1)


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _positions(tokens: Tensor, inputs: dict[str, Any]) -> Tensor:
    """Return the position (B, T) of each token in its row's text; the positions of left padding are negative."""
    cache = inputs.get("cache", inputs.get("past_key_values"))
    past = 0 if cache is None else int(cache.get_seq_length())
    positions = past + torch.arange(tokens.shape[1], device=tokens.device)
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return positions.expand(len(tokens), -1)
    return positions - (mask.cumsum(1) == 0).sum(1, keepdim=True)


def _prepare_methods(
    model: nn.Module, adapters: AdapterSet, names: list[str], inputs: dict[str, Any]
) -> dict[Any, dict[str, Any]]:
    """Call `before_forward` of the adapters in effect: {their shared module: values of the adapter arguments}."""
    in_effect, route = adapters.selection.in_effect_anywhere, adapters.selection.route
    values: dict[Any, dict[str, Any]] = {}
    for name in names:
        if name not in in_effect or name in adapters.prompts:
            continue
        if getattr(adapters.configs[name], "target_modules", None) == NO_TARGETS:
            continue
        kind, config, own = adapters.kinds[name], adapters.configs[name], adapters.of_method(name)
        if route is None or route.uniform is not None:
            kind.before_forward(config, own, model, inputs)
        else:
            _prepare_rows(model, adapters, name, own, route, inputs)
        if (shared := shared_by(own)) is not None and not torch.compiler.is_compiling():
            values[shared] = values_of(shared)
    return values


def _prepare_rows(
    model: nn.Module, adapters: AdapterSet, name: str, own: dict[str, Adapter], route: Route, inputs: dict[str, Any]
) -> None:
    """Call `before_forward` of one adapter, with the rows of the batch that use the adapter."""
    kind, config = adapters.kinds[name], adapters.configs[name]
    if len({one for one in route.compositions if name in one.names()}) > 1:
        raise RoutingError(
            f"{name!r} ({config.method}) reads the rows of each call, so only one composition of a batch can have "
            "it; give its rows the same composition, or split the batch"
        )
    rows = route.rows_of(name)
    with adapters.selection.routed(Route(name)):  # a method may call the model itself
        kind.before_forward(config, own, model, {key: _of_rows(v, rows, route) for key, v in inputs.items()})


def _of_rows(value: Any, numbers: list[int], route: Route) -> Any:
    """Return the rows of an argument that belong to some compositions of a route; other arguments unchanged."""
    rows = route.rows or len(route.compositions)
    if isinstance(value, Tensor) and value.dim() and len(value) == rows:
        return value[route.expanded(numbers, rows).to(value.device)]
    if isinstance(value, list) and len(value) == len(route.compositions):
        return [value[number] for number in numbers]
    return value


def _before_encoder(
    adapters: AdapterSet, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    learners = _prompts(adapters, True)
    if not learners:
        return None
    adapter_arguments = {**adapters.call_arguments, **adapters.generate_arguments}
    args, inputs = _by_name(encoder, args, kwargs)
    inputs = {**adapter_arguments, **inputs}
    for learner in learners:
        learner.before_encoder(encoder, inputs)
    return args, {key: value for key, value in inputs.items() if key not in adapter_arguments}


def _after_forward(model: nn.Module, _args: Any, outputs: Any) -> Any:
    adapters: AdapterSet | None = model.__dict__.get(ATTRIBUTE)
    if adapters is None:
        return None
    adapters.call_arguments = {}
    for learner in _prompts(adapters, is_encoder_decoder(model)):
        outputs = learner.after_forward(outputs)
    return outputs


def _prompts(adapters: AdapterSet, has_encoder: bool) -> list[PromptLearner]:
    """Return the prompts in effect; of a mixed batch, learners that give each row its own prompt.

    Learners whose prompt is no part of the input come first, because they read the text without virtual tokens.
    """
    route = adapters.selection.route
    if route is None or route.chain is not None:
        prompts = adapters.prompts_in_effect()
        return sorted(prompts, key=lambda learner: learner.exclusive) if len(prompts) > 1 else prompts
    if route.prompts is None:
        added = [adapters.prompts[name] for name in route.names if name in adapters.prompts]
        mixed = _mixed_prompts(adapters, route, has_encoder)
        route.prompts = [*(learner for learner in added if not learner.exclusive), *mixed]
    return route.prompts


def _check_positions(learners: list[PromptLearner]) -> None:
    """Raise RoutingError if a call has virtual tokens and a method that acts at positions of the text."""
    acting = next((one for one in learners if one.acts_at_positions), None)
    adding = next((one for one in learners if one.exclusive and not one.adapts_blocks), None)
    if acting is not None and adding is not None:
        raise RoutingError(
            f"{type(acting).__name__} acts at positions of the text, which {type(adding).__name__} shifts; give the "
            "rows of one call only one of the two"
        )


def _mixed_prompts(adapters: AdapterSet, route: Route, has_encoder: bool) -> list[PromptLearner]:
    learners: list[list[PromptLearner]] = []
    for one in route.compositions:
        named = [adapters.prompts[name] for name in one.names() if name in adapters.prompts]
        exclusive = [learner for learner in named if learner.exclusive]
        if exclusive and (one.chain() is None or len(exclusive) > 1):
            raise RoutingError(f"{one!r} mixes a prompt with others, which is not possible; use one prompt for a row")
        learners.append(exclusive)
    return mixed_learners(learners, partial(_of_rows, route=route), has_encoder) if any(learners) else []


def _by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return (positional, named) arguments: positional only where the forward does not take them by name."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return args, dict(kwargs)
    count = sum(parameter.kind is parameter.POSITIONAL_ONLY for parameter in parameters)
    names = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    return args[:count], {**dict(zip(names, args[count:], strict=False)), **kwargs}


def _for_each_row(value: Any, inputs: dict[str, Any]) -> Any:
    """Repeat a per-row argument for the beams that `generate` makes of each row."""
    tokens = next((inputs[k] for k in ("input_ids", "inputs_embeds") if inputs.get(k) is not None), None)
    if not isinstance(value, torch.Tensor) or tokens is None or not value.dim() or len(tokens) % len(value):
        return value
    return value.repeat_interleave(len(tokens) // len(value), dim=0)


@contextlib.contextmanager
def generation(model: nn.Module, arguments: dict[str, Any], inputs: Any = None) -> Iterator[dict[str, Any]]:
    """Pass the adapter arguments of `generate` on to every call of the model inside of the context.

    Args:
        model: the model with adapters.
        arguments: keyword arguments of `generate`.
        inputs: its first positional argument; None if it has only keyword arguments.

    Yields:
        The arguments for the model's own `generate`.

    Raises:
        ConfigError: a prompt is in effect, and the cache is not empty; or an option does not fit an active adapter.
    """
    adapters: AdapterSet = model.__dict__[ATTRIBUTE]
    names = frozenset().union(*adapters.forward_arguments.values())
    _check_cache(model, adapters, arguments)
    _check_options(model, adapters, arguments)
    before, route = adapters.generate_arguments, adapters.selection.route
    kinds = (adapters.kinds[name] for name in adapters.selection.in_effect)
    fixed = {key: value for kind in kinds for key, value in kind.generate_arguments.items()}
    learners = [adapters.prompts[name] for name in adapters.selection.in_effect if name in adapters.prompts]
    text = {key: value for key, value in {"input_ids": inputs, **arguments}.items() if value is not None}
    try:
        if route is not None:
            route.rows = None  # unknown until the model's own forward, and an encoder runs before
            route.repeats = True
        adapters.generate_arguments = {key: value for key, value in arguments.items() if key in names}
        for learner in learners:
            learner.begin_generation(text)
        # now, because an encoder runs by itself, before the first forward of the model
        prepared = [name for name, own in adapters.forward_arguments.items() if own & arguments.keys()]
        _prepare_methods(model, adapters, prepared, dict(adapters.generate_arguments))
        yield {**{key: value for key, value in arguments.items() if key not in names}, **fixed}
    finally:
        for learner in learners:
            learner.end_generation()
        adapters.generate_arguments = before
        if route is not None:
            route.repeats = False


def _check_options(model: nn.Module, adapters: AdapterSet, arguments: dict[str, Any]) -> None:
    """Raise ConfigError if an option of `generate` does not fit one of the adapters in effect."""
    sources = [arguments.get("generation_config"), getattr(model, "generation_config", None)]
    for name in adapters.selection.in_effect_anywhere:
        kind = adapters.kinds[name]
        refused = kind.refused_generate_options(adapters.configs[name]) if issubclass(kind, Adapter) else {}
        for option, reason in refused.items():
            if arguments.get(option) or any(getattr(source, option, None) for source in sources):
                raise ConfigError(f"generate: {option} does not fit {name!r}: {reason}; leave {option} out")


def _check_cache(model: nn.Module, adapters: AdapterSet, arguments: dict[str, Any]) -> None:
    cache = arguments.get("cache", arguments.get("past_key_values"))
    learners = _prompts(adapters, is_encoder_decoder(model))
    has_prompt = any(learner.exclusive and not learner.adapts_blocks for learner in learners)
    if has_prompt and not is_empty(cache):
        raise ConfigError(
            "generate counts the cache's entries as tokens of the text, and a prompt adds entries; give the whole text "
            "and no cache, or an empty one"
        )
