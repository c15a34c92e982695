"""Float16 copies of linear layers: the numbers of float32, and never of a weight that has changed."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peftcore import LoraConfig, get_peft_model
from peftcore.bases import Float16CopyLinear, add_float16_copies, base_weight
from peftcore.bases.float16_copy import MAX_TOKENS, can_copy

if torch.backends.quantized.engine not in ("x86", "fbgemm"):
    pytest.skip("this build of PyTorch has no product with float16 weights", allow_module_level=True)

ROUNDING = 2e-6
"""Largest error of a float32 product here, as a share of the largest output."""


def plain(bias: bool = False) -> nn.Linear:
    """A float32 layer with weights that were stored in bfloat16, some of them tiny."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 48, bias=bias)
    with torch.no_grad():
        layer.weight[:, ::7] *= 1e-5
    return layer.bfloat16().float().requires_grad_(False)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each product with a copy."""
    found: list[int] = []
    own = Float16CopyLinear.short_output

    def counted(self: Float16CopyLinear, x: torch.Tensor) -> torch.Tensor | None:
        if (y := own(self, x)) is not None:
            found.append(y.numel() // y.shape[-1])
        return y

    monkeypatch.setattr(Float16CopyLinear, "short_output", counted)
    return found


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (16, 1), (2, 3), (4, 32), (5,)])
@torch.no_grad()
def test_the_output_is_that_of_float32(shape: tuple[int, ...], bias: bool, products: list[int]) -> None:
    layer = plain(bias)
    x = torch.randn(*shape, 64)
    expected = layer.double()(x.double())
    y = Float16CopyLinear(plain(bias))(x)
    assert y.shape == (*shape, 48) and len(products) == 1
    assert (y - expected).abs().max() <= ROUNDING * expected.abs().max()


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_pytorchs_two_names_of_the_product_agree(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 5, 128)[:, -1:, ::2]  # as an output head gets the last tokens: not contiguous
    y = Float16CopyLinear(plain(bias))(x)
    monkeypatch.delattr(torch, "fbgemm_linear_fp16_weight_fp32_activation")
    assert torch.equal(Float16CopyLinear(plain(bias))(x), y)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@torch.no_grad()
def test_a_duplicate_takes_its_own_float32_weight(duplicate: Callable[[Any], Any], products: list[int]) -> None:
    layer, x = Float16CopyLinear(plain()), torch.randn(2, 64)
    assert torch.equal(duplicate(layer)(x), plain()(x)) and not products


CASES: dict[str, Callable[[Any], Any]] = {
    "many tokens": lambda layer: layer(torch.ones(MAX_TOKENS + 1, 64)),
    "no axis of tokens": lambda layer: layer(torch.ones(64)),
    "no token": lambda layer: layer(torch.ones(0, 64)),
    "another type": lambda layer: layer.double()(torch.ones(1, 64).double()),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_other_inputs_take_the_float32_weight(case: str, products: list[int]) -> None:
    assert torch.equal(CASES[case](Float16CopyLinear(plain())), CASES[case](plain())) and not products


@torch.no_grad()
def test_vmap_takes_the_float32_weight(products: list[int]) -> None:
    layer, x = Float16CopyLinear(plain()), torch.randn(3, 2, 64)
    torch.testing.assert_close(torch.vmap(layer)(x), plain()(x))
    assert not products


def test_gradients_and_autocast_take_the_float32_weight(products: list[int]) -> None:
    x = torch.randn(2, 64, requires_grad=True)
    layer = Float16CopyLinear(plain())
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, 64))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert not products


def in_place(layer: Any) -> None:
    layer.weight.mul_(2)


def through_data(layer: Any) -> None:
    layer.weight.data = 2 * layer.weight.data


def as_parameter(layer: Any) -> None:
    layer.weight = nn.Parameter(2 * layer.weight, requires_grad=False)


def by_state_dict(layer: Any) -> None:
    layer.load_state_dict({"weight": 2 * layer.weight})


def by_the_view(layer: Any) -> None:
    base_weight(layer).write(2 * layer.weight)


def through_another_type(layer: Any) -> None:
    layer.weight.mul_(2)
    layer.double().float()


@pytest.mark.parametrize(
    "change", [in_place, through_data, as_parameter, by_state_dict, by_the_view, through_another_type]
)
@torch.no_grad()
def test_a_changed_weight_is_seen_at_once(change: Callable[[Any], None], products: list[int]) -> None:
    layer, x = Float16CopyLinear(plain()), torch.randn(2, 64)
    y = layer(x)
    change(layer)
    torch.testing.assert_close(layer(x), 2 * y, atol=1e-5, rtol=0)
    assert len(products) == 1, "the copy is of the old weight"


def test_layers_that_float16_cannot_hold_or_that_are_not_plain_have_no_copy() -> None:
    assert can_copy(plain())
    assert (
        not can_copy(plain().double())
        and not can_copy(plain().bfloat16())
        and not can_copy(plain().requires_grad_(False).to(torch.float16))
    )
    too_large = plain()
    too_large.weight[0, 0] = 70000.0
    assert not can_copy(too_large)
    not_finite = plain()
    not_finite.weight[0, 0] = torch.nan
    assert not can_copy(not_finite)
    hooked = plain()
    hooked.register_forward_hook(lambda *_: None)
    assert not can_copy(hooked) and not can_copy(Float16CopyLinear(plain())) and not can_copy(nn.Embedding(3, 4))
    assert not can_copy(plain().to("meta"))


def llama() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, tie_word_embeddings=True, **sizes))
    return model.bfloat16().float().eval()


@torch.no_grad()
def test_a_model_keeps_its_parameters_its_ties_and_its_numbers(products: list[int]) -> None:
    model, tokens = llama(), torch.arange(12).view(3, 4)
    expected, state = model(tokens).logits, model.state_dict()
    assert add_float16_copies(model) == 15
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {name: id(value.untyped_storage()) for name, value in state.items()}.keys() == model.state_dict().keys()
    torch.testing.assert_close(model(tokens).logits, expected, atol=1e-5, rtol=1e-5)
    assert len(products) == 15 and add_float16_copies(model) == 0
    torch.testing.assert_close(copy.deepcopy(model)(tokens).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("names", [None, ["a", "b", "__base__"], "a"])
@pytest.mark.parametrize("tokens", [1, 4])
@torch.no_grad()
def test_adapters_on_copied_layers_give_the_numbers_of_float32(names: Any, tokens: int, products: list[int]) -> None:
    ids = torch.arange(3 * tokens).view(3, tokens)
    outputs = []
    for copies in (False, True):
        model = with_adapters(copies)
        outputs.append(model(ids, **({} if names is None else {"adapter_names": names})).logits)
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-4, rtol=1e-5)
    assert len(products) == 15, "each layer by its copy"


@torch.no_grad()
def test_merging_ends_the_use_of_the_copies_and_unmerging_takes_it_up_again(products: list[int]) -> None:
    ids = torch.arange(4).view(1, 4)
    model = with_adapters(True)
    expected = model(ids).logits
    products.clear()
    with model.merged():
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-5)
        assert len(products) == 1, "the output head alone, which has no adapter"
    assert torch.equal(model(ids).logits, expected) and len(products) == 16


def with_adapters(copies: bool) -> Any:
    model = llama()
    if copies:
        add_float16_copies(model)
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(model, config, "a")
    model.add_adapter("b", config)
    return model.eval()
