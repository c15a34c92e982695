"""What a call of the whole model tells its adapters: a hook before its forward and one after, installed with the first
adapter. Between the two, layers may share inputs, and the call is recorded for what may be computed again.

Hooks and not an overridden `forward`, because accelerate and others replace `forward` on the instance.
"""

import contextlib
import inspect
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
from peftcore.layers.active import in_compiled_call
from peftcore.layers.forward_paths import contiguous_input
from peftcore.layers.wrapper import unwrapped
from peftcore.prompts.learner import PromptLearner, is_encoder_decoder
from peftcore.prompts.mixed import mixed

_TEXTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


def install(model: nn.Module) -> None:
    """Have acting adapters told of each forward of `model`, and its head given rows that lie together."""
    model.register_forward_pre_hook(_before_forward, with_kwargs=True)
    model.register_forward_hook(_end_call, always_call=True)
    if (head := _head(model)) is not None and contiguous_input not in head._forward_pre_hooks.values():
        head.register_forward_pre_hook(contiguous_input)


def _head(model: nn.Module) -> nn.Module | None:
    """The linear layer that gives a transformers model's logits; None where there is none."""
    try:
        found = unwrapped(model.get_output_embeddings())  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Linear) else None


def install_prompts(model: Any, adapters: AdapterSet) -> None:
    """Have prompt learners told of outputs too, and of the encoder, which `generate` calls without the model."""
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
    _check_weights_are_here(adapters, route)
    changed = None
    if route is not None or adapters.forward_arguments:
        changed, values = _told(model, adapters, route, args, kwargs)
    if not in_compiled_call():
        selection.begin_call(values)
    return changed


def needs_call(model: nn.Module, arguments: dict[str, Any]) -> bool:
    """Whether a `forward` with these arguments is not inside of a call of the model, and adapters are to be told."""
    adapters: AdapterSet | None = model.__dict__.get(ATTRIBUTE)
    if adapters is None or in_compiled_call() or adapters.selection.cache.calls:
        return False
    if "adapter_names" in arguments or adapters.selection.route is not None:
        return True
    return any(name in adapters.forward_arguments for name in adapters.selection.in_effect)


def _end_call(model: nn.Module, _args: Any, outputs: Any) -> None:
    adapters: AdapterSet | None = model.__dict__.get(ATTRIBUTE)
    if adapters is not None and not in_compiled_call():
        adapters.selection.end_call(outputs)


def _check_weights_are_here(adapters: AdapterSet, route: Route | None) -> None:
    """RoutingError where another thread has put the base's own weights in place of merged ones."""
    if adapters.unmerged_by and not (route is not None and route.is_final):
        raise RoutingError(
            f"{list(adapters.merged)} are merged, and another thread is inside of disable_adapter(), where the model's "
            "one set of weights is the base's own; call unmerge_adapter() first, then each thread has its own adapters"
        )


def _told(
    model: nn.Module, adapters: AdapterSet, route: Route | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[tuple[Any, ...], dict[str, Any]], dict[Any, dict[str, Any]]]:
    """Tell the route and the acting adapters of a call: (its arguments, what adapter arguments came to)."""
    args, inputs = _by_name(model, args, kwargs)
    inputs = {**adapters.generate_arguments, **inputs}
    taken = frozenset().union(*adapters.forward_arguments.values())
    for key in taken & inputs.keys():
        inputs[key] = _for_each_row(inputs[key], inputs)
    adapters.call_arguments = {key: inputs[key] for key in taken & inputs.keys()}
    if route is not None:
        _begin(route, args, inputs)
    values = _tell(model, adapters, list(adapters.forward_arguments), inputs)
    for learner in _prompts(adapters, is_encoder_decoder(model)):  # last, because others may look for words in the text
        learner.before_forward(model, inputs)
    if route is not None:
        route.flattened = _flattened(args, inputs)
    return (args, {key: value for key, value in inputs.items() if key not in taken}), values


def _begin(route: Route, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
    """Tell a route of the forward that begins."""
    given = [inputs[key] for key in _TEXTS if inputs.get(key) is not None]
    first = next((value for value in (*given, *args, *inputs.values()) if _has_rows(value)), None)
    if first is None:
        raise RoutingError("the model is called without a tensor, so its rows cannot be counted")
    route.begin(len(first), _positions(first, inputs) if route.needs_positions else None)


def _flattened(args: tuple[Any, ...], inputs: dict[str, Any]) -> frozenset[int]:
    """Tokens of the whole batch (count), of each text that a call is given."""
    texts = [inputs[key] for key in _TEXTS if inputs.get(key) is not None]
    others = [value for value in (*args, *inputs.values()) if isinstance(value, Tensor) and value.dim() > 2]
    return frozenset(value.shape[0] * value.shape[1] for value in (*texts, *others) if value.dim() > 1)


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _positions(tokens: Tensor, inputs: dict[str, Any]) -> Tensor:
    """(B, T): each token's place in its row's text, padding in front not counted; below 0 for that itself."""
    cache = inputs.get("cache", inputs.get("past_key_values"))
    past = 0 if cache is None else int(cache.get_seq_length())
    places = past + torch.arange(tokens.shape[1], device=tokens.device)
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return places.expand(len(tokens), -1)
    return places - (mask.cumsum(1) == 0).sum(1, keepdim=True)


def _tell(
    model: nn.Module, adapters: AdapterSet, names: list[str], inputs: dict[str, Any]
) -> dict[Any, dict[str, Any]]:
    """Tell acting adapters of a call: {shared module of an adapter: what its arguments came to}."""
    acting, route = adapters.selection.in_effect, adapters.selection.route
    values: dict[Any, dict[str, Any]] = {}
    for name in names:
        if name not in acting or name in adapters.prompts:
            continue
        kind, config, own = adapters.kinds[name], adapters.configs[name], adapters.of_method(name)
        if route is None or route.uniform is not None:
            kind.before_forward(config, own, model, inputs)
        else:
            _tell_of_rows(model, adapters, name, own, route, inputs)
        if (shared := shared_by(own)) is not None and not torch.compiler.is_compiling():
            values[shared] = values_of(shared)
    return values


def _tell_of_rows(
    model: nn.Module, adapters: AdapterSet, name: str, own: dict[str, Adapter], route: Route, inputs: dict[str, Any]
) -> None:
    """Tell one adapter of its own rows of a batch."""
    kind, config = adapters.kinds[name], adapters.configs[name]
    if len({one for one in route.compositions if name in one.names()}) > 1:
        raise RoutingError(
            f"{name!r} looks at the rows of each call ({config.peft_type}), so it can be in one composition of a "
            "batch; give its rows the same one, or split the batch"
        )
    rows = route.rows_of(name)
    with adapters.selection.routed(Route(name)):  # a method may call the model itself
        kind.before_forward(config, own, model, {key: _of_rows(v, rows, route) for key, v in inputs.items()})


def _of_rows(value: Any, numbers: list[int], route: Route) -> Any:
    """The rows of some of a route's compositions, of an argument that has as many rows as the batch."""
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
    for_adapters = {**adapters.call_arguments, **adapters.generate_arguments}
    args, inputs = _by_name(encoder, args, kwargs)
    inputs = {**for_adapters, **inputs}
    for learner in learners:
        learner.before_encoder(encoder, inputs)
    return args, {key: value for key, value in inputs.items() if key not in for_adapters}


def _after_forward(model: nn.Module, _args: Any, outputs: Any) -> Any:
    adapters: AdapterSet | None = model.__dict__.get(ATTRIBUTE)
    if adapters is None:
        return None
    adapters.call_arguments = {}
    for learner in _prompts(adapters, is_encoder_decoder(model)):
        outputs = learner.after_forward(outputs)
    return outputs


def _prompts(adapters: AdapterSet, has_encoder: bool) -> list[PromptLearner]:
    """The prompts that act; where rows have different ones, what stands for them all."""
    route = adapters.selection.route
    if route is None or route.chain is not None:
        return adapters.prompts_in_effect()
    if route.prompts is None:
        route.prompts = _mixed_prompts(adapters, route, has_encoder)
    return route.prompts


def _mixed_prompts(adapters: AdapterSet, route: Route, has_encoder: bool) -> list[PromptLearner]:
    learners: list[list[PromptLearner]] = []
    for one in route.compositions:
        named = [adapters.prompts[name] for name in one.names() if name in adapters.prompts]
        feeding = [learner for learner in named if learner.exclusive]
        if feeding and (one.chain() is None or len(feeding) > 1):
            raise RoutingError(f"{one!r} weighs or splits a prompt, which is read or not; give it a row of its own")
        learners.append(feeding)
    return mixed(learners, partial(_of_rows, route=route), has_encoder) if any(learners) else []


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
    taken = frozenset().union(*adapters.forward_arguments.values())
    _check_cache(model, adapters, given)
    before, route = adapters.generate_arguments, adapters.selection.route
    if route is not None:
        route.rows = None  # an encoder runs before the model's own forward tells of them
        route.repeats = True
    adapters.generate_arguments = {key: value for key, value in given.items() if key in taken}
    kinds = (adapters.kinds[name] for name in adapters.selection.in_effect)
    fixed = {key: value for kind in kinds for key, value in kind.generate_arguments.items()}
    try:  # an encoder runs by itself, before the first forward of the model
        told = [name for name, own in adapters.forward_arguments.items() if own & given.keys()]
        _tell(model, adapters, told, dict(adapters.generate_arguments))
        yield {**{key: value for key, value in given.items() if key not in taken}, **fixed}
    finally:
        adapters.generate_arguments = before
        if route is not None:
            route.repeats = False


def _check_cache(model: nn.Module, adapters: AdapterSet, given: dict[str, Any]) -> None:
    cache = given.get("cache", given.get("past_key_values"))
    feeding = any(learner.exclusive for learner in _prompts(adapters, is_encoder_decoder(model)))
    if feeding and cache is not None and cache.get_seq_length():
        raise ConfigError(
            "generate counts a cache's entries as tokens of the text, and a prompt is among them; "
            "give it the whole text and no cache, or an empty one"
        )
