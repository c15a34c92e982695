"""Rows of one batch by different adapters: each is what it is alone, whatever the methods; nothing is left behind."""

import copy
import gc
import inspect
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from method_example import examples, randomise
from quantised_layers import quantised
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from peftcore import IA3Config, LoraConfig, OFTConfig, PolyConfig, PromptTuningConfig, get_peft_model
from peftcore.composition import Average, Gate, Only, Parallel, Split, Stack, Weighted
from peftcore.errors import AdapterNameError, RoutingError
from peftcore.layers import forward_paths
from peftcore.registry import methods

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOKENS = torch.arange(3, 45).view(6, 7)
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
LAYERED = {
    method: example
    for method, example in examples().items()
    if "linear" in methods()[method].adapter.layer_kinds and not example.whole_model
}


def llama(dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).to(dtype)


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4)).double()


def t5() -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=60, decoder_start_token_id=0, **sizes)).double()


def lora(**options: Any) -> LoraConfig:
    fixed = {"target_modules": "all-linear", "init_lora_weights": False, "inference_mode": True}
    return LoraConfig(**{"r": 4, "lora_alpha": 6, **fixed, **options})


def adapted(base: Any, double: bool = True, **configs: Any) -> Any:
    """A model with these adapters, moved away from their start; in evaluation."""
    model = base
    for number, (name, config) in enumerate(configs.items()):
        config.inference_mode = False
        model = get_peft_model(model, config, name) if number == 0 else model
        if number:
            model.add_adapter(name, config)
        for other in model.peft_config:
            model.set_requires_grad(other, other == name)
        randomise(model, 0.2, seed=number)
    for name in configs:
        model.set_requires_grad(name, False)
    return (model.double() if double else model).eval()


def mixture(base: Any) -> Any:
    return adapted(
        base,
        a=lora(),
        b=lora(r=2, lora_alpha=8, use_rslora=True, rank_pattern={"0.*": 3}),
        c=OFTConfig(oft_block_size=4, target_modules=_two(base)),
        d=IA3Config(target_modules=_two(base), feedforward_modules=_two(base)[1:]),
    )


def _two(base: Any) -> list[str]:
    return ["c_attn", "c_fc"] if isinstance(base, GPT2LMHeadModel) else ["v_proj", "up_proj"]


def assert_rows_as_alone(model: Any, names: list[Any], tokens: Tensor = TOKENS, **arguments: Any) -> None:
    """Every row of a mixed batch is what its composition gives for that row alone; with gradients and without."""
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            mixed = model(tokens[: len(names)], adapter_names=names, **arguments).logits
            for row, name in enumerate(names):
                own = {key: value[row : row + 1] for key, value in arguments.items()}
                with model.route(name):
                    alone = model(tokens[row : row + 1], **own).logits
                torch.testing.assert_close(mixed[row : row + 1], alone, atol=1e-10, rtol=0)


# -- exactness ------------------------------------------------------------------------------------------------------

COMPOSED: list[Any] = [
    ["a", "b", None, "a", "__base__", "b"],
    ["a", "b", "c", "d", None, "c"],
    [{"a": 0.5, "b": -1.0}, Parallel("a", "b"), Average("a", "b"), Stack("a", "b"), None, 0.3 * Only("a")],
    [{"c": 0.5, "a": 1.0}, Stack("c", "d"), Stack({"a": 0.5, "d": 0.5}, "c"), "a", Average("c", "d"), "b"],
    [Split(a=2, b=3), Split(("c", 1), (None, 2), ("a", ...)), "a", None, Split(("a", 3), ({"b": 2.0}, ...)), "b"],
]


@pytest.mark.parametrize("base", [llama, gpt2])
@pytest.mark.parametrize("names", COMPOSED)
def test_a_row_is_what_it_is_alone(base: Any, names: list[Any]) -> None:
    assert_rows_as_alone(mixture(base()), names)


@pytest.mark.parametrize("method", LAYERED)
def test_every_method_beside_lora_and_the_base(method: str) -> None:
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
                alone = model(x[row : row + 1], adapter_names=name, **own) if name else _base(model, x[row : row + 1])
                torch.testing.assert_close(mixed[row : row + 1], alone, atol=1e-10, rtol=0)


def _base(model: Any, x: Tensor) -> Tensor:
    with model.disable_adapter():
        return model(x)


def test_compositions_are_sums_of_what_the_adapters_change() -> None:
    """On one layer, from each adapter's own output."""
    torch.manual_seed(0)
    model = adapted(
        nn.Sequential(nn.Linear(12, 8)).double(),
        a=lora(target_modules=["0"]),
        b=lora(target_modules=["0"], use_dora=True),
        c=OFTConfig(oft_block_size=4, target_modules=["0"]),
    )
    x = torch.randn(5, 12, dtype=torch.float64)
    base, (a, b, c) = _base(model, x), [model(x, adapter_names=name) - _base(model, x) for name in "abc"]
    for given, change in (
        ({"a": 0.5, "b": 2.0, "c": -1.0}, 0.5 * a + 2 * b - c),
        (Average("a", "b", "c"), (a + b + c) / 3),
        (Parallel("a", "c"), a + c),
        (0.5 * (Only("a") - Only("b")), 0.5 * a - 0.5 * b),
    ):
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                torch.testing.assert_close(model(x, adapter_names=given), base + change, atol=1e-12, rtol=0)


def test_a_stack_is_what_set_adapter_makes_of_the_names() -> None:
    model = mixture(llama())
    for names in (["a", "b"], ["c", "a", "d"]):
        model.set_adapter(names)
        expected = model(TOKENS).logits
        model.set_adapter("a")
        torch.testing.assert_close(model(TOKENS, adapter_names=Stack(*names)).logits, expected, atol=1e-12, rtol=0)
        nested = Stack(Stack(names[0]), *[Weighted({name: 1.0}) for name in names[1:]])
        torch.testing.assert_close(model(TOKENS, adapter_names=nested).logits, expected, atol=1e-10, rtol=0)


def test_a_split_gives_each_token_its_adapter() -> None:
    """At a layer: the tokens that a composition gets are those of that composition alone."""
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


def test_a_split_counts_on_while_decoding() -> None:
    model = mixture(llama())
    given = Split(("a", 9), ("b", ...))
    whole = model.generate(TOKENS[:2], adapter_names=given, **GREEDY)
    with torch.no_grad():
        logits = model(whole[:, :-1], adapter_names=given).logits
    assert torch.equal(logits[:, 6:].argmax(-1), whole[:, 7:])


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


def test_modules_trained_whole_are_each_rows_own() -> None:
    model = adapted(
        llama(),
        a=lora(modules_to_save=["lm_head"]),
        b=lora(),
        c=lora(target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]),
    )
    assert_rows_as_alone(model, ["a", "b", "c", None, Stack("b", "c"), {"a": 0.5, "b": 0.5}])
    with pytest.raises(RoutingError, match=r"trained whole by \['a', 'c'\], and whole modules cannot be mixed"):
        model(TOKENS, adapter_names={"a": 0.5, "c": 0.5})


def test_embeddings_heads_and_pooled_rows() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    bert = BertForSequenceClassification(BertConfig(vocab_size=60, **sizes)).double()
    targets = ["query", "word_embeddings", "dense", "classifier"]
    model = adapted(bert, a=lora(target_modules=targets), b=lora(r=2, target_modules=targets))
    assert_rows_as_alone(model, ["a", "b", None, {"a": 0.5, "b": 1.0}])


def test_alora_acts_where_its_row_was_invoked() -> None:
    model = adapted(llama(), a=lora(alora_invocation_tokens=[20, 21]), b=lora())
    tokens = TOKENS.clone()
    tokens[0, 2:4] = tokens[3, 4:6] = torch.tensor([20, 21])
    assert_rows_as_alone(model, ["a", "b", None, "a", "a", "b"], tokens)
    with pytest.raises(RoutingError, match="only one composition of a batch can have it"):
        model(tokens, adapter_names=["a", Stack("a", "b"), None, None, None, None])


# -- generation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}])
@pytest.mark.parametrize("padded", [False, True])
def test_generate_row_by_row(options: dict[str, Any], padded: bool) -> None:
    model, names = mixture(llama()), ["a", "b", "c", None, {"a": 0.5, "d": 1.0}, Stack("a", "c")]
    mask = torch.ones_like(TOKENS)
    if padded:
        mask[1, :2] = mask[4, :3] = 0
    mixed = model.generate(TOKENS, attention_mask=mask, adapter_names=names, **GREEDY, **options)
    for row, name in enumerate(names):
        with model.route(name):
            own = {"attention_mask": mask[row : row + 1]}
            alone = model.generate(TOKENS[row : row + 1], **own, **GREEDY, **options)
        assert torch.equal(mixed[row, : alone.shape[1]], alone[0])


def test_generate_samples_from_each_rows_own_distribution() -> None:
    model, names = mixture(llama()), ["a", "b"]
    options = {**GREEDY, "do_sample": True, "num_return_sequences": 3, "top_k": 1}
    mixed = model.generate(TOKENS[:2], adapter_names=names, **options)
    alone = [model.generate(TOKENS[i : i + 1], adapter_names=name, **options) for i, name in enumerate(names)]
    assert torch.equal(mixed, torch.cat(alone))


def test_encoder_and_decoder_go_the_same_way() -> None:
    model = adapted(t5(), a=lora(), b=lora(r=2, target_modules=["q", "v"]))
    names = ["a", "b", None, "a"]
    assert_rows_as_alone(model, names, decoder_input_ids=TOKENS[:4, :3])
    mixed = model.generate(TOKENS[:4], adapter_names=names, **GREEDY)
    for row, name in enumerate(names):
        alone = model.generate(
            TOKENS[row : row + 1], adapter_names=[name], **GREEDY
        )  # a list, so that None is the base
        assert torch.equal(mixed[row, : alone.shape[1]], alone[0])


def test_decoding_with_another_set_of_rows_each_step() -> None:
    """As a server does: a cache per row, put together differently from step to step."""
    model = mixture(llama(torch.float64))
    alone = {name: model.generate(TOKENS[:1], adapter_names=name, **GREEDY)[0] for name in ("a", "b")}
    with torch.no_grad():
        caches = {}
        for name in alone:
            caches[name] = DynamicCache(config=model.config)
            model(TOKENS[:1], cache=caches[name], adapter_names=[name])
        for step in range(7, 11):
            for name in ("a", "b"):
                token = alone[name][step].view(1, 1)
                logits = model(token, cache=caches[name], adapter_names=[name]).logits
                assert logits[0, -1].argmax() == alone[name][step + 1]


# -- gradients ------------------------------------------------------------------------------------------------------


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


# -- the stacked path -----------------------------------------------------------------------------------------------


@pytest.fixture
def stacks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many layers each stacked product has computed."""
    seen: list[int] = []
    original = forward_paths.stacked_outputs

    def counted(x: Tensor, bases: Any, *others: Any) -> Any:
        seen.append(len(bases))
        return original(x, bases, *others)

    monkeypatch.setattr(forward_paths, "stacked_outputs", counted)
    return seen  # type: ignore[return-value]


def test_low_rank_rows_go_through_two_products_for_all_layers_of_one_input(stacks: list[int]) -> None:
    model = mixture(llama())
    with torch.no_grad():
        for given in (["a", "b", None, "a", "b", "a"], {"a": 0.5, "b": 0.5}, Split(a=3, b=2), "a", Stack("a", "b")):
            stacks.clear()
            model(TOKENS, adapter_names=given)
            assert stacks == [3, 1, 2, 1] * 2, given  # query, key, value; output; gate, up; down
            model.zero_grad()
        stacks.clear()
        model(TOKENS, adapter_names=["a", "c", None, "a", "b", "a"])
        assert stacks == [2, 1, 1, 1] * 2 and not model._adapter_set.selection.cache.outputs
    stacks.clear()
    model(TOKENS, adapter_names=["a", "b", None, "a", "b", "a"])  # with gradients
    assert not stacks


def test_long_rows_are_computed_stretch_by_stretch(stacks: list[int]) -> None:
    model = mixture(llama())
    tokens = torch.arange(3, 59).repeat(6, 2)[:, :100]
    names = ["a", "a", "b", None, {"a": 0.5, "b": -2.0}, "a"]
    expected = model(tokens, adapter_names=names).logits
    with torch.no_grad():
        stacks.clear()
        torch.testing.assert_close(model(tokens, adapter_names=names).logits, expected, atol=1e-10, rtol=0)
        assert not stacks
        model(tokens[:, :9], adapter_names=names)
        assert stacks


def test_stacks_follow_the_weights(stacks: list[int]) -> None:
    model = mixture(llama())
    names = ["a", "b", "a", None, "a", "b"]

    def both() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            fast = model(TOKENS, adapter_names=names).logits
        return fast, model(TOKENS, adapter_names=names).logits

    before = both()[0]
    for parameter in model.parameters():
        if parameter.shape[:1] == (4,):
            with torch.no_grad():
                parameter.mul_(1.5)
    fast, general = both()
    assert not torch.allclose(fast, before)
    torch.testing.assert_close(fast, general, atol=1e-10, rtol=0)
    model.delete_adapter("b")
    model.add_adapter("b", lora(r=3))
    torch.testing.assert_close(*both(), atol=1e-10, rtol=0)
    model.set_requires_grad("a", True)
    with torch.no_grad():
        fast = model(TOKENS, adapter_names=names).logits
        for name, parameter in model.named_parameters():
            if "adapters.a." in name:
                parameter.data.mul_(2.0)  # as an optimiser of another library does: no version is counted
    torch.testing.assert_close(*both(), atol=1e-10, rtol=0)
    assert not torch.allclose(both()[0], fast)


@pytest.mark.parametrize("ranks", [[3] * 9, [3] * 8 + [2]], ids=["batched by adapter", "other ranks"])
def test_many_adapters_with_as_many_rows(ranks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(llama(), **{f"a{n}": lora(r=r, lora_alpha=5) for n, r in enumerate(ranks)})
    names: list[Any] = [f"a{n}" for n in (4, 0, 8, 1, 7, 2, 6, 3, 5)]
    tokens = torch.arange(3, 39).view(18, 2)
    batched: list[int] = []
    original = forward_paths.batched_outputs
    monkeypatch.setattr(forward_paths, "batched_outputs", lambda *given: batched.append(1) or original(*given))
    for given in (names, sorted(names), names * 2, [name for name in names for _ in range(2)]):
        batched.clear()
        assert_rows_as_alone(model, given, tokens)
        assert bool(batched) == (set(ranks) == {3})
    for given in ([*names[:8], None], [*names, "a0"], [*names[:8], {"a5": 0.5}], [*names[:8], Stack("a5", "a0")]):
        batched.clear()
        assert_rows_as_alone(model, given, tokens)
        assert not batched
    with torch.no_grad(), model.route(names):  # beams, which lie together
        beams = model.generate(tokens[:9], num_beams=2, **GREEDY)
    for row, name in enumerate(names):
        with torch.no_grad(), model.route(name):
            alone = model.generate(tokens[row : row + 1], num_beams=2, **GREEDY)
        assert torch.equal(beams[row, : alone.shape[1]], alone[0])  # alone it may end earlier


def _hooked(model: Any) -> None:
    model.model.layers[0].self_attn.v_proj.base_layer.register_forward_hook(lambda layer, args, y: y * 2)


def _listened_to_before(model: Any) -> None:
    model.model.layers[0].self_attn.q_proj.base_layer.register_forward_pre_hook(lambda layer, args: (args[0] * 2,))


def _forward_replaced(model: Any) -> None:
    layer = model.model.layers[0].mlp.up_proj.base_layer
    layer.forward = lambda x: nn.functional.linear(x, layer.weight) * 2


def _base_replaced(model: Any) -> None:
    layer = model.model.layers[1].mlp.gate_proj.base_layer
    layer.weight = nn.Parameter(layer.weight * 2, requires_grad=False)


def _base_trained(model: Any) -> None:
    model.model.layers[1].mlp.gate_proj.base_layer.weight.requires_grad_(True)


def _rounded(model: Any) -> None:
    model.float().double()


def _assigned(model: Any) -> None:
    state = {key: value * 2 if "adapters.a." in key else value for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def _edited(model: Any) -> None:
    with torch.no_grad():
        model._adapter_set.layers["model.layers.0.self_attn.k_proj"].adapters["a"].lora_B.mul_(2)


def _added(model: Any) -> None:
    model.delete_adapter("b")
    model.add_adapter("b", lora(r=2, target_modules=["q_proj", "down_proj"]))


def _told_apart(model: Any) -> None:
    """A layer that others computed for is called with an input of its own."""
    first = model.model.layers[0].self_attn
    inside = first.k_proj.forward
    first.k_proj.forward = lambda x: inside(x * 2)


@pytest.mark.parametrize(
    "change",
    [
        _hooked,
        _listened_to_before,
        _forward_replaced,
        _base_replaced,
        _base_trained,
        _rounded,
        _assigned,
        _edited,
        _added,
        _told_apart,
    ],
    ids=lambda change: change.__name__,
)
@pytest.mark.parametrize("names", [["a", "b", None, "a", {"b": 0.5}, "b"], "a"], ids=["rows", "one"])
def test_what_is_remembered_of_layers_follows_every_change(change: Any, names: Any) -> None:
    model = mixture(llama())
    with model.route(names):  # the same one before and after
        with torch.no_grad():
            before = model(TOKENS).logits
        if change is not _added:
            change(model)
        for _ in range(2):
            with torch.no_grad():
                fast = model(TOKENS).logits
            general = model(TOKENS).logits
            torch.testing.assert_close(fast, general, atol=1e-10, rtol=0)
            assert change in (_added, _base_trained, _rounded) or not torch.allclose(fast, before, atol=1e-6)
            model.zero_grad()
    if change is _added:
        change(model)
    with torch.no_grad():  # the same names again, by a route of their own
        fast = model(TOKENS, adapter_names=names).logits
    torch.testing.assert_close(fast, model(TOKENS, adapter_names=names).logits, atol=1e-10, rtol=0)


def test_active_adapters_are_followed_too() -> None:
    model = mixture(llama())
    for change in (
        lambda: model.set_adapter(["a", "b"]),
        lambda: model.merge_adapter(["a"]),
        lambda: model.unmerge_adapter(),
        lambda: model.set_adapter("b"),
    ):
        change()
        for _ in range(2):
            with torch.no_grad():
                fast = model(TOKENS).logits
            torch.testing.assert_close(fast, model(TOKENS).logits, atol=1e-10, rtol=0)


def test_ranks_that_change_in_training_are_followed() -> None:
    model = adapted(llama(), **{f"a{n}": lora(r=3) for n in range(9)})
    model.set_requires_grad("a4", True)
    for names in ([f"a{n % 9}" for n in range(6)], [f"a{n}" for n in range(9)], "a4"):
        tokens = TOKENS if len(names) == 6 else torch.arange(3, 39).view(9, 4)
        for rank in (3, 2, 4):
            for site in model._adapter_set.layers.values():
                adapter = site.adapters["a4"]
                o, i = adapter.lora_B.shape[0], adapter.lora_A.shape[1]
                adapter.lora_A = nn.Parameter(torch.randn(rank, i, dtype=torch.float64))
                adapter.lora_B = nn.Parameter(torch.randn(o, rank, dtype=torch.float64))
            with torch.no_grad():
                fast = model(tokens, adapter_names=names).logits
            general = model(tokens, adapter_names=names).logits
            torch.testing.assert_close(fast, general.detach(), atol=1e-9, rtol=0)


def test_dropout_is_not_forgotten_by_what_is_remembered() -> None:
    model = adapted(llama(), a=lora(lora_dropout=0.5), b=lora())
    with torch.no_grad():
        for names in ("a", ["a", "b", None, "a", "b", "a"]):
            for trains in (False, True, False):
                model.train(trains)
                once, again = (model(TOKENS, adapter_names=names).logits for _ in range(2))
                assert torch.equal(once, again) != trains


@pytest.mark.parametrize("broken", ["weights", "activations"])
def test_an_adapter_that_gives_no_numbers_spoils_its_own_rows_alone(broken: str) -> None:
    model = mixture(llama(torch.float32)).float()
    names = ["a", "b", None, "a", {"b": 0.5}, "c"]
    with torch.no_grad():
        expected = model(TOKENS, adapter_names=names).logits
        for name, parameter in model.named_parameters():
            if "adapters.a.lora_A" in name:
                parameter.fill_(torch.nan if broken == "weights" else 3e38)
        for given in (names, ["a", "b", None, "a", {"b": 0.5}, "b"]):
            found = model(TOKENS, adapter_names=given).logits
            torch.testing.assert_close(found[[1, 2, 4]], expected[[1, 2, 4]], atol=1e-4, rtol=0)
            assert not found[0].isfinite().any()


def test_a_deleted_adapter_is_let_go() -> None:
    model = mixture(llama())
    with torch.no_grad():
        model(TOKENS, adapter_names=["a", "b", None, "a", "b", "a"])
    gone = weakref.ref(model._adapter_set.layers["model.layers.0.mlp.up_proj"].adapters["b"].lora_A)
    model.delete_adapter("b")
    gc.collect()
    assert gone() is None


def test_half_precision_at_a_layer_is_close_to_double() -> None:
    """Per layer, because a model's own rounding would hide an error."""
    torch.manual_seed(0)
    exact = adapted(
        nn.Sequential(nn.Linear(64, 48)).double(), a=lora(target_modules=["0"]), b=lora(target_modules=["0"])
    )
    half = copy.deepcopy(exact).to(torch.bfloat16)
    x, names = torch.randn(6, 64).bfloat16(), ["a", "b", None, {"a": 0.5, "b": 0.5}, "b", "a"]
    with torch.no_grad():
        found, expected = half(x, adapter_names=names), exact(x.double(), adapter_names=names)
    assert (found.double() - expected).norm() / expected.norm() < 0.01


# -- what is left behind --------------------------------------------------------------------------------------------


def test_an_error_inside_leaves_no_route() -> None:
    model = mixture(llama())
    model.set_adapter("a")
    expected = model(TOKENS).logits
    with pytest.raises(IndexError):
        model(torch.full((2, 3), 999), adapter_names=["b", None])
    with pytest.raises(ZeroDivisionError), model.route(["b", None]):
        raise ZeroDivisionError
    assert torch.equal(model(TOKENS).logits, expected)
    assert not any(model._adapter_set.selection.in_use.values())


def test_nothing_switches_adapters_on_inside_of_disable_adapter() -> None:
    """There the model is its base, as the context promises; naming an adapter all the same is an error."""
    model = mixture(llama())
    base = model(TOKENS, adapter_names="__base__").logits
    said = r"\['b'\] cannot be used inside of disable_adapter\(\), where the model is its base; leave that context"
    with model.disable_adapter():
        for call in (model, model.forward, model.generate):
            with pytest.raises(RoutingError, match=said):
                call(TOKENS, adapter_names="b")
        with pytest.raises(RoutingError, match=said), model.route(["b", None]):
            pass
        with model.route([None] * 6), pytest.raises(RoutingError, match=said), model.route("b"):
            pass
        assert torch.equal(model(TOKENS, adapter_names=[None] * 6).logits, base)
        model.set_adapter("b")  # for the time after
        assert torch.equal(model(TOKENS).logits, base)
        with model.disable_adapter():
            assert torch.equal(model(TOKENS).logits, base)
        assert torch.equal(model(TOKENS).logits, base)
    assert torch.equal(model(TOKENS).logits, model(TOKENS, adapter_names="b").logits)


def test_routes_nest_and_disabling_stands_over_them() -> None:
    model = mixture(llama())
    alone = {name: model(TOKENS, adapter_names=name).logits for name in ("__base__", "a", "b")}
    with model.route("a"):
        with model.route("b"):
            assert torch.equal(model(TOKENS).logits, alone["b"])
        assert torch.equal(model(TOKENS).logits, alone["a"])
        with model.disable_adapter():
            assert torch.equal(model(TOKENS).logits, alone["__base__"])
        assert torch.equal(model(TOKENS).logits, alone["a"])


def test_threads_do_not_see_one_another() -> None:
    """Also what a method learns of a call, such as where it was invoked (aLoRA), or its tasks (Poly)."""
    model = mixture(llama())
    model.add_adapter("invoked", lora(alora_invocation_tokens=[20]))
    model.add_adapter("poly", PolyConfig(n_tasks=2, n_skills=2, r=2, target_modules=["q_proj"], init_weights=False))
    model.double().eval()
    names = ["a", "b", "c", "__base__", "invoked", "poly"]
    tokens = {name: TOKENS if name == "invoked" else TOKENS.flip(0) for name in names}
    given = {name: {"task_ids": torch.tensor([0, 1] * 3)} if name == "poly" else {} for name in names}

    def forward(name: str) -> Tensor:
        return model(tokens[name], adapter_names=name, **given[name]).logits

    with torch.no_grad():
        alone = {name: forward(name) for name in names}
    failures: list[str] = []
    start = threading.Barrier(len(names))

    def work(name: Any) -> None:
        start.wait()
        for turn in range(15):
            with torch.no_grad():
                if turn % 2:
                    found = forward(name)
                else:
                    found = model(tokens[name], adapter_names=[name] * len(TOKENS), **given[name]).logits
            if not torch.allclose(found, alone[name], atol=1e-10, rtol=0):
                failures.append(f"{name} in turn {turn}")

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_forward_called_directly_is_the_call() -> None:
    """PyTorch leaves hooks out there, and adapters are told of a call by hooks."""
    model = mixture(llama())
    model.add_adapter("invoked", lora(alora_invocation_tokens=[20]))
    model.add_adapter("prompt", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    model.double().eval()
    names = ["a", "b", None, "c", {"a": 0.5, "b": 1.0}, "prompt"]
    assert torch.equal(model.forward(TOKENS, adapter_names=names).logits, model(TOKENS, adapter_names=names).logits)
    assert not torch.equal(model(TOKENS, adapter_names="b").logits, model(TOKENS).logits)
    for name in ("b", "invoked", "prompt"):
        with model.route(name):
            assert torch.equal(model.forward(TOKENS).logits, model(TOKENS).logits)
        model.set_adapter(name)
        assert torch.equal(model.forward(input_ids=TOKENS).logits, model(TOKENS).logits)
    model.set_adapter("invoked")
    offsets = {"alora_offsets": [2] * 6}
    assert torch.equal(model.forward(TOKENS, **offsets).logits, model(TOKENS, **offsets).logits)
    with pytest.raises(RoutingError, match="2 adapter names for a batch of 6 rows"):
        model.forward(TOKENS, adapter_names=["a", "b"])
    assert inspect.signature(model.forward) == inspect.signature(llama().forward)


def test_a_copy_and_a_pickle_made_inside_a_route_have_none() -> None:
    model = mixture(llama())
    model.set_adapter("a")
    with torch.no_grad(), model.route("b"):
        model(TOKENS)
        copied = copy.deepcopy(model)
    assert torch.equal(copied(TOKENS).logits, model(TOKENS).logits)


# -- bad input ------------------------------------------------------------------------------------------------------


def test_bad_input_is_named() -> None:
    model = mixture(llama())
    expected = model(TOKENS).logits
    for names, error, said in (
        (["a", "b"], RoutingError, r"2 adapter names for a batch of 3 rows; give one for each row"),
        (["a"] * 4, RoutingError, r"4 adapter names for a batch of 3 rows"),
        (["a"], RoutingError, r"1 adapter names for a batch of 3 rows"),
        ([], RoutingError, "a route for no rows"),
        (["a", "z", "b"], AdapterNameError, r"no adapter named 'z'; loaded: a, b, c, d"),
        (["a", 3, "b"], RoutingError, "3 is no composition"),
    ):
        with pytest.raises(error, match=said):
            model(TOKENS[:3], adapter_names=names)
    model.merge_adapter(["a"])
    with pytest.raises(RoutingError, match=r"\['a'\] are merged into the base, so every row would use them"):
        model(TOKENS, adapter_names=["b"] * 6)
    model.unmerge_adapter()
    with model.route(["b"] * 6), pytest.raises(AdapterNameError, match="in use by an open route"):
        model.delete_adapter("b")
    assert torch.equal(model(TOKENS).logits, expected)


def test_layers_where_rows_cannot_be_told_are_refused() -> None:
    class Mixing(nn.Module):
        kept = 5

        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(12, 12) for _ in range(2))
            self.mixed = nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.mixed(self.experts[0](x.flatten(0, 1))[: self.kept])

    model = adapted(Mixing().double(), a=lora(target_modules=["experts.0"]), b=lora(target_modules=["mixed"]))
    x = torch.randn(2, 4, 12, dtype=torch.float64)
    with pytest.raises(RoutingError, match=r"experts\.0 is a single expert and gets tokens without their rows"):
        model(x, adapter_names=["a", None])
    for gradients in (False, True):
        with (
            torch.set_grad_enabled(gradients),
            pytest.raises(RoutingError, match="mixed sees 5 rows and the batch has 2"),
        ):
            model(x, adapter_names=["b", None])
    model.kept = 4  # two for each row, or so it seems
    with pytest.raises(RoutingError, match="mixed sees 4 rows and the batch has 2"):
        model(x, adapter_names=["b", None])
    assert model(x, adapter_names=["a", "a"]).shape == (4, 12)
    model.kept = 8  # every token of the batch
    mixed = model(x, adapter_names=["b", None])
    torch.testing.assert_close(mixed[:4], model(x, adapter_names="b")[:4])
    torch.testing.assert_close(mixed[4:], model(x, adapter_names="__base__")[4:])


# -- other ways to compute -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_quantised_layers(storage: str) -> None:
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


def test_autocast_and_inference_mode() -> None:
    model = mixture(llama(torch.float32)).float()
    names = ["a", "b", None, "a", {"a": 0.5, "b": 1.0}, "b"]
    with torch.no_grad():
        exact = model(TOKENS, adapter_names=names).logits
    with torch.inference_mode():
        torch.testing.assert_close(model(TOKENS, adapter_names=names).logits, exact, atol=1e-5, rtol=0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cast = model(TOKENS, adapter_names=names).logits
    assert 0 < (cast - exact).abs().max() < 0.2 * exact.abs().max()


def test_one_graph_break_or_none_the_numbers_are_the_same() -> None:
    """`torch.compile` takes the general path, for it makes its own fusions."""
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
