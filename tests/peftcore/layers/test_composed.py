"""The general path: a composition at a layer equals its formula, for every method, with gradients and without."""

from typing import Any

import pytest
import torch
from method_example import examples
from quantised_layers import quantised
from routed_models import TOKENS, adapted, assert_rows_as_alone, base_output, llama, lora, mixture
from torch import Tensor, nn

from peftcore import OFTConfig
from peftcore.composition import Average, Gate, Only, Parallel, Split, Stack, Weighted
from peftcore.registry import methods

LAYERED = {
    method: example
    for method, example in examples().items()
    if "linear" in methods()[method].adapter.layer_kinds and not example.whole_model
}


@pytest.mark.parametrize("method", [method for method, example in LAYERED.items() if not example.mixes_rows])
def test_every_method_beside_lora_and_the_base_equals_its_rows_alone(method: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 8)).double()
    model = adapted(
        net,
        first=LAYERED[method].make(target_modules=["0"]),
        second=lora(target_modules=["0", "2"]),
        third=LAYERED[method].make(target_modules=["0"]),
    )
    x, names = torch.randn(5, 12, dtype=torch.float64), ["first", "second", None, "third", "first"]
    given = {"task_ids": torch.zeros(5, dtype=torch.long)} if method == "POLY" else {}
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            mixed = model(x, adapter_names=names, **given)
            for row, name in enumerate(names):
                own = {key: value[row : row + 1] for key, value in given.items()}
                alone = (
                    model(x[row : row + 1], adapter_names=name, **own) if name else base_output(model, x[row : row + 1])
                )
                torch.testing.assert_close(mixed[row : row + 1], alone, atol=1e-10, rtol=0)


def test_compositions_are_sums_of_what_the_adapters_change() -> None:
    """On one layer, computed from the output of each adapter alone."""
    torch.manual_seed(0)
    model = adapted(
        nn.Sequential(nn.Linear(12, 8)).double(),
        a=lora(target_modules=["0"]),
        b=lora(target_modules=["0"], use_dora=True),
        c=OFTConfig(oft_block_size=4, target_modules=["0"]),
    )
    x = torch.randn(5, 12, dtype=torch.float64)
    base, (a, b, c) = base_output(model, x), [model(x, adapter_names=name) - base_output(model, x) for name in "abc"]
    for given, change in (
        ({"a": 0.5, "b": 2.0, "c": -1.0}, 0.5 * a + 2 * b - c),
        (Average("a", "b", "c"), (a + b + c) / 3),
        (Parallel("a", "c"), a + c),
        (0.5 * (Only("a") - Only("b")), 0.5 * a - 0.5 * b),
    ):
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                torch.testing.assert_close(model(x, adapter_names=given), base + change, atol=1e-12, rtol=0)


def test_a_stack_equals_set_adapter_with_the_same_names() -> None:
    model = mixture(llama())
    for names in (["a", "b"], ["c", "a", "d"]):
        model.set_adapter(names)
        expected = model(TOKENS).logits
        model.set_adapter("a")
        torch.testing.assert_close(model(TOKENS, adapter_names=Stack(*names)).logits, expected, atol=1e-12, rtol=0)
        nested = Stack(Stack(names[0]), *[Weighted({name: 1.0}) for name in names[1:]])
        torch.testing.assert_close(model(TOKENS, adapter_names=nested).logits, expected, atol=1e-10, rtol=0)


def test_a_split_gives_each_token_its_adapter() -> None:
    """At one layer, each token's output is that of its own adapter."""
    model = mixture(llama())
    layer, x = model.model.layers[0].mlp.up_proj, torch.randn(2, 7, 32, dtype=torch.float64)
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda module, args, output: seen.append(layer.forward(x)))
    mask = torch.tensor([[1] * 7, [0, 0, *[1] * 5]])
    with torch.no_grad():
        for given in ("a", "c", "__base__", Split(("a", 2), ("c", 3))):
            model(TOKENS[:2], adapter_names=given, attention_mask=mask)
    a, c, base, split = seen
    torch.testing.assert_close(split[0], torch.cat([a[0, :2], c[0, 2:5], base[0, 5:]]), atol=1e-12, rtol=0)
    torch.testing.assert_close(split[1], torch.cat([base[1, :2], a[1, 2:4], c[1, 4:]]), atol=1e-12, rtol=0)


def test_a_gate_weighs_every_token_of_every_layer() -> None:
    model = mixture(llama())

    def gating(path: str, adapters: dict[str, Any], x: Tensor) -> Tensor:
        first = x[..., :1].sigmoid()
        return torch.cat([first, 1 - first], -1)[..., : len(adapters)]

    for names in (("a", "b"), ("a", "c")):
        gate = Gate(names, gating)
        with torch.no_grad():
            fast = model(TOKENS, adapter_names=gate).logits
        torch.testing.assert_close(fast, model(TOKENS, adapter_names=gate).logits, atol=1e-10, rtol=0)
        assert not torch.allclose(fast, model(TOKENS, adapter_names=Average(*names)).logits)
        assert_rows_as_alone(model, [gate, "a", None, "b"])
    constant = Gate(("a", "b"), lambda path, adapters, x: torch.full((*x.shape[:-1], 2), 0.5, dtype=x.dtype))
    mean = model(TOKENS, adapter_names=Average("a", "b")).logits
    torch.testing.assert_close(model(TOKENS, adapter_names=constant).logits, mean, atol=1e-10, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_adapter_learns_from_its_own_rows(checkpointing: bool) -> None:
    model = mixture(llama()).train()
    model.set_requires_grad(["a", "b", "c"], True)
    model.lm_head.weight.requires_grad_(True)  # so that the base's row has a gradient
    names = ["a", "b", "c", None, "a", {"b": 0.5, "c": 0.5}]
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})

    def gradients(rows: list[int]) -> dict[str, Tensor]:
        model.zero_grad()
        loss = model(TOKENS[rows], labels=TOKENS[rows], adapter_names=[names[row] for row in rows]).loss
        (loss * len(rows)).backward()  # outside of the route: recomputing must know it all the same
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    together = gradients(list(range(6)))
    summed: dict[str, Tensor] = {}
    model.activation_checkpointing_disable()
    for row in range(6):
        for name, gradient in gradients([row]).items():
            summed[name] = summed[name] + gradient if name in summed else gradient
    assert together.keys() == summed.keys()
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, summed[name], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("storage", ["nf4", "int8", "Q4_1"])
def test_rows_of_quantised_layers_equal_those_rows_alone(storage: str) -> None:
    torch.manual_seed(0)
    model = adapted(
        nn.Sequential(quantised(storage)),
        double=False,
        a=lora(target_modules=["0"]),
        b=lora(r=2, target_modules=["0"]),
        c=OFTConfig(oft_block_size=4, target_modules=["0"]),
    )
    x = torch.randn(6, 64)
    for names in (["a", "b", None, {"a": 0.5, "b": 0.5}, "b", "a"], ["a", "c", None, "c", "b", Stack("a", "c")]):
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                mixed = model(x, adapter_names=names)
                alone = torch.cat([_one(model, x[row : row + 1], name) for row, name in enumerate(names)])
            torch.testing.assert_close(mixed, alone, atol=2e-2 if storage == "int8" else 1e-4, rtol=0)


def _one(model: Any, x: Tensor, name: Any) -> Tensor:
    with model.route(name):
        return model(x)


def test_autocast_and_inference_mode_change_only_the_precision() -> None:
    model = mixture(llama(torch.float32)).float()
    names = ["a", "b", None, "a", {"a": 0.5, "b": 1.0}, "b"]
    with torch.no_grad():
        exact = model(TOKENS, adapter_names=names).logits
    with torch.inference_mode():
        torch.testing.assert_close(model(TOKENS, adapter_names=names).logits, exact, atol=1e-5, rtol=0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cast = model(TOKENS, adapter_names=names).logits
        alone = torch.cat([_one(model, TOKENS[row : row + 1], name).logits for row, name in enumerate(names)])
    assert 0 < (cast - exact).abs().max() < 2 * (alone - exact).abs().max()


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_outputs() -> None:
    """`torch.compile` takes the general path, because it fuses by itself."""
    torch.manual_seed(0)
    one = {"target_modules": ["0"]}
    model = adapted(nn.Sequential(nn.Linear(12, 8)).double(), a=lora(**one), b=lora(**one))
    x, names = torch.randn(4, 12, dtype=torch.float64), ["a", "b", None, {"a": 0.5, "b": 0.5}]
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        expected = model(x, adapter_names=names)
        torch.testing.assert_close(compiled(x, adapter_names=names), expected, atol=1e-12, rtol=0)
        with model.route(names):
            torch.testing.assert_close(compiled(x), expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(compiled(x), model(x), atol=1e-12, rtol=0)
