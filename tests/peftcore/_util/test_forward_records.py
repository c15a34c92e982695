"""Activation checkpointing: a layer that is computed again sees the adapters and arguments of its own forward pass.

The facts: gradients are those without checkpointing, however many forward passes come before one backward, whatever
acts by the time of the backward, whichever thread it runs in.
"""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from method_example import randomise
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from peftcore import LoraConfig, PolyConfig, get_peft_model
from peftcore._util.forward_records import live_records
from peftcore.composition import Parallel, Split, Stack
from peftcore.errors import RoutingError
from peftcore.injection.activation import activate

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOKENS = torch.arange(3, 45).view(6, 7)
Forward = Callable[[Any], Tensor]


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": False, **options}
    )


def model_with(**configs: Any) -> Any:
    """A Llama with these adapters, all of which train."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SIZES)).double()
    for number, (name, config) in enumerate(configs.items()):
        model = model if number else get_peft_model(model, config, name)
        if number:
            model.add_adapter(name, config)
    randomise(model, 0.2, seed=1)
    for name in configs:
        model.set_requires_grad(name)
    return model.double().train()


def mixture() -> Any:
    poly = PolyConfig(n_tasks=3, n_skills=2, r=2, target_modules=["q_proj", "down_proj"], init_weights=False)
    return model_with(a=lora(), b=lora(r=2), invoked=lora(alora_invocation_tokens=[20]), poly=poly)


def loss(model: Any, rows: slice = slice(None), **arguments: Any) -> Tensor:
    tokens = TOKENS[rows]
    return model(input_ids=tokens, labels=tokens, **arguments).loss


def gradients(model: Any, backward: Callable[[Any], None], **checkpointing: Any) -> dict[str, Tensor]:
    """What a backward leaves in the adapters; with activation checkpointing if its arguments are given."""
    model.zero_grad()
    model.activation_checkpointing_disable()
    if checkpointing:
        model.activation_checkpointing_enable(checkpointing)
    model.enable_input_require_grads()
    backward(model)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_as_without(model: Any, backward: Callable[[Any], None], reentrant: bool) -> None:
    for module in model.modules():  # Poly draws its routing while it trains
        if module.__class__.__name__ == "Router":
            module.eval()
    expected = gradients(model, backward)
    found = gradients(model, backward, use_reentrant=reentrant)
    assert found.keys() == expected.keys() and any(own.abs().max() > 1e-4 for own in expected.values())
    for name, own in expected.items():
        torch.testing.assert_close(found[name], own, atol=1e-10, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


PAIRS: dict[str, tuple[Forward, Forward]] = {
    "names": (lambda m: loss(m, adapter_names="a"), lambda m: loss(m, adapter_names="b")),
    "the base last": (lambda m: loss(m, adapter_names="a"), lambda m: loss(m, adapter_names="__base__") * 0),
    "a mixture, then a name": (
        lambda m: loss(m, adapter_names={"a": 0.5, "b": -1.0}),
        lambda m: loss(m, adapter_names="b"),
    ),
    "a name, then rows": (
        lambda m: loss(m, adapter_names="a"),
        lambda m: loss(m, adapter_names=["a", "b", None, "b", Stack("a", "b"), Parallel("a", "b")]),
    ),
    "rows of two batch sizes": (
        lambda m: loss(m, slice(0, 2), adapter_names=["a", "b"]),
        lambda m: loss(m, slice(2, 6), adapter_names=["b", None, "a", "b"]),
    ),
    "positions": (
        lambda m: loss(m, adapter_names=Split(a=2, b=3)),
        lambda m: loss(m, adapter_names=Split(("b", 4), ("a", ...))),
    ),
    "no route, then one": (loss, lambda m: loss(m, adapter_names="b")),
    "one, then no route": (lambda m: loss(m, adapter_names="b"), loss),
    "aLoRA's offsets": (
        lambda m: loss(m, adapter_names="invoked", alora_offsets=[3] * 6),
        lambda m: loss(m, adapter_names="invoked", alora_offsets=[6] * 6),
    ),
    "Poly's tasks": (
        lambda m: loss(m, adapter_names="poly", task_ids=torch.tensor([0, 1, 2, 0, 1, 2])),
        lambda m: loss(m, adapter_names="poly", task_ids=torch.tensor([2, 2, 1, 1, 0, 0])),
    ),
    "arguments of some rows": (
        lambda m: loss(m, adapter_names=["invoked"] * 3 + ["a"] * 3, alora_offsets=[2] * 6),
        lambda m: loss(m, adapter_names=["a"] * 3 + ["invoked"] * 3, alora_offsets=[5] * 6),
    ),
}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("pair", PAIRS)
def test_two_forward_passes_before_one_backward(pair: str, reentrant: bool) -> None:
    first, second = PAIRS[pair]
    assert_as_without(mixture(), lambda model: (first(model) + second(model)).backward(), reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_backwards_in_any_order_and_more_than_once(reentrant: bool) -> None:
    def backward(model: Any) -> None:
        losses = [loss(model, adapter_names=name) for name in ("a", "b", "invoked")]
        losses[1].backward(retain_graph=True)
        losses[0].backward()
        (losses[1] * 0.5 + losses[2]).backward()

    assert_as_without(mixture(), backward, reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_acts_at_the_time_of_the_backward_does_not_matter(reentrant: bool) -> None:
    def switched(model: Any) -> None:
        activate(model, "a")
        first = loss(model)
        activate(model, ["b", "a"])
        second = loss(model)
        activate(model, "b")
        (first + second).backward()

    def disabled(model: Any) -> None:
        first = loss(model, adapter_names="a")
        with model.disable_adapter():
            first.backward()

    def routed(model: Any) -> None:
        activate(model, "a")
        first = loss(model)
        with model.route("b"):
            second = loss(model)
            first.backward()
        second.backward()

    for backward in (switched, disabled, routed):
        assert_as_without(mixture(), backward, reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_routed_models_in_one_graph(reentrant: bool) -> None:
    """Also one inside of the other's loss, and in two orders."""
    other = model_with(a=lora(r=3), b=lora(r=1))

    def both(model: Any, names: tuple[str, str]) -> None:
        total = loss(model, adapter_names=names[0]) * loss(other, adapter_names=names[1])
        total = total + loss(other, adapter_names=names[0]) + loss(model, adapter_names=names[1])
        total.backward()

    for names in (("a", "b"), ("b", "a")):
        wrapped = nn.ModuleList([mixture(), other])
        expected: dict[str, Tensor] = {}
        for checkpointing in (False, True):
            for one in wrapped:
                one.zero_grad()
                one.activation_checkpointing_disable()
                if checkpointing:
                    one.activation_checkpointing_enable({"use_reentrant": reentrant})
                one.enable_input_require_grads()
            both(wrapped[0], names)
            found = {name: p.grad.clone() for name, p in wrapped.named_parameters() if p.grad is not None}
            expected = expected or found
            assert found.keys() == expected.keys()
            for name, own in expected.items():
                torch.testing.assert_close(found[name], own, atol=1e-10, rtol=0)


class Blocks(nn.Module):
    """Two linear layers of which a part is computed again, as its caller says."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.again: Any = None

    def part(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))

    def forward(self, x: Tensor) -> Any:
        y = self.part(x) if self.again is None else self.again(self.part, x)
        return {"parts": [(y,)], "count": 1}


def small() -> Any:
    model: Any = get_peft_model(Blocks().double(), lora(target_modules=["first", "second"]), "a")
    model.add_adapter("b", lora(r=2, target_modules=["first", "second"]))
    model.set_requires_grad(["a", "b"])
    return model.double()


def nested(function: Any, x: Tensor, use_reentrant: bool) -> Tensor:
    def inner(z: Tensor) -> Tensor:
        return checkpoint(function, torch.sin(z), use_reentrant=use_reentrant)

    return checkpoint(inner, x, use_reentrant=use_reentrant)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of the inner one, in a forward without
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("again", [checkpoint, nested], ids=["one", "nested"])
def test_any_module_outputs_of_any_form_and_nested_checkpoints(again: Any, reentrant: bool) -> None:
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    found = []
    for kind in (None, partial(again, use_reentrant=reentrant)):
        model = small()
        model.again = kind or ((lambda f, z: f(torch.sin(z))) if again is nested else None)
        outputs = [
            model(x, adapter_names=name)["parts"][0][0].square().sum() for name in ("a", {"a": 0.5, "b": 2.0}, "b")
        ]
        (outputs[0] + outputs[1] * outputs[2]).backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-10, rtol=0)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("way", ["the whole model", "its own call inside", "a part of it"])
def test_what_is_checkpointed_may_be_the_model_or_a_part_of_it(way: str, reentrant: bool) -> None:
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def output(model: Any, name: str, again: bool) -> Tensor:
        recompute = partial(checkpoint, use_reentrant=reentrant) if again else lambda function, z: function(z)
        if way == "its own call inside":
            return recompute(lambda z: model(z, adapter_names=name)["parts"][0][0], x)
        with model.route(name):
            return recompute(model.part if way == "a part of it" else lambda z: model(z)["parts"][0][0], x)

    found = []
    for again in (False, True):
        model = small()
        total = output(model, "a", again).square().sum() + output(model, "b", again).exp().sum()
        with model.route("b"):
            total.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-10, rtol=0)


def test_threads_that_train_side_by_side() -> None:
    """Their autograd nodes have the same numbers; each has a backward of its own."""
    x = torch.randn(3, 6, dtype=torch.float64)

    def of(name: str, model: Any, start: Any = None) -> list[Tensor]:
        inputs = x.clone().requires_grad_()
        outputs = model(inputs, adapter_names=name)["parts"][0][0]
        if start is not None:
            start.wait()
        wanted = [inputs, *(p for p in model.parameters() if p.requires_grad)]
        found = torch.autograd.grad(outputs.square().sum(), wanted, allow_unused=True)
        return [gradient for gradient in found if gradient is not None]

    model = small()
    expected = {name: of(name, model) for name in ("a", "b")}
    model.again = partial(checkpoint, use_reentrant=False)
    start, found = threading.Barrier(2), {}
    threads = [threading.Thread(target=lambda n=name: found.update({n: of(n, model, start)})) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, own in expected.items():
        for one, other in zip(found[name], own, strict=True):
            torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


def test_one_backward_for_forward_passes_of_two_threads_is_refused() -> None:
    model, outputs = small(), []
    model.again = partial(checkpoint, use_reentrant=False)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    work = lambda name: outputs.append(model(x, adapter_names=name)["parts"][0][0].sum())  # noqa: E731
    threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with pytest.raises(RoutingError, match="forward passes of several threads"):
        sum(outputs).backward()


def test_layers_that_learn_whose_input_they_share_are_computed_again_as_they_were() -> None:
    """The first step of an encoder-decoder: query, key and value of cross-attention read different inputs."""
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
        base = T5ForConditionalGeneration(T5Config(vocab_size=60, decoder_start_token_id=0, **sizes)).double()
        model = get_peft_model(base, lora()).double().train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        for _ in range(2):
            model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-10, rtol=0)


def test_hidden_states_that_a_hook_kept_are_enough() -> None:
    def backward(model: Any) -> None:
        kept: list[Tensor] = []
        with model.model.layers[1].register_forward_hook(
            lambda _m, _x, y: kept.append(y[0] if isinstance(y, tuple) else y)
        ):
            model(TOKENS, adapter_names="a")
        activate(model, "b")
        kept[0].square().sum().backward()

    assert_as_without(mixture(), backward, reentrant=False)


def test_records_live_as_long_as_the_graphs_of_their_outputs() -> None:
    model = mixture()
    selection = model._adapter_set.selection
    kept = [loss(model, adapter_names="a") for _ in range(3)]
    calls = lambda: [record for record in live_records(selection) if record.is_call]  # noqa: E731
    assert len(calls()) == 3
    del kept[1:]
    assert len(calls()) == 2  # the last one stays until the next
    for _ in range(200):
        kept[:] = [loss(model, adapter_names="b")]
    assert len(calls()) == 1 and len(live_records(selection)) < 70
    with torch.no_grad():
        loss(model, adapter_names="b")
    assert len(calls()) == 1


@pytest.mark.slow
def test_a_compiled_call_leaves_nothing_open() -> None:
    """A part of it runs uncompiled, because routes cannot be compiled."""
    model = small().eval()
    x = torch.randn(3, 6, dtype=torch.float64)
    compiled: Any = torch.compile(model, backend="eager")
    with torch.no_grad():
        expected = model(x, adapter_names=["a", "b", None])["parts"][0][0]
        found = compiled(x, adapter_names=["a", "b", None])["parts"][0][0]
    torch.testing.assert_close(found, expected)
    assert not model._adapter_set.selection.cache.calls


def test_a_backward_that_failed_says_nothing_of_later_ones() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.first, x, use_reentrant=False)

    torch.manual_seed(0)
    config, x = LoraConfig(r=2, target_modules=["first"], init_lora_weights=False), torch.randn(3, 6)
    model: Any = get_peft_model(Checkpointed(), config, "a")
    model.add_adapter("b", config)
    y = model(x)

    def fails(*_: Any) -> None:
        raise ArithmeticError

    handle = model.first.base_layer.register_forward_hook(fails)
    with pytest.raises(ArithmeticError):
        y.sum().backward()
    handle.remove()
    model.set_adapter("b")
    gradients = []
    for output in (model.first(x), checkpoint(model.first, x, use_reentrant=False)):  # no call of the whole model
        model.zero_grad()
        output.square().sum().backward()
        gradients.append([p.grad for p in model.first.adapters["b"].parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)
