"""Packed copies of linear layers: the numbers of the weight itself, and never of one that has changed."""

import copy
import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peftcore import LoraConfig, get_peft_model
from peftcore.bases import PackedCopyLinear, add_packed_copies, base_weight, compute_dtype, packed_copy
from peftcore.bases.packed_copy import MOST_TOKENS, can_copy, packs_bfloat16

pytestmark = pytest.mark.usefixtures("fast_in_bfloat16")
FLOAT32 = pytest.param(
    torch.float32,
    marks=pytest.mark.skipif(
        torch.backends.quantized.engine not in ("x86", "fbgemm"),
        reason="this build of PyTorch has no product with float16 weights",
    ),
)
BFLOAT16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(not packs_bfloat16(), reason="this PyTorch packs no bfloat16 weights on this CPU"),
)
TYPES = pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8}
"""{dtype: largest error of a product here, as a share of the largest output}"""


@pytest.fixture
def fast_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that counts as fast in bfloat16."""
    monkeypatch.setattr(compute_dtype, "_is_slow", lambda dtype: False)


def plain(dtype: torch.dtype = torch.float32, bias: bool = False) -> nn.Linear:
    """A layer with weights that were stored in bfloat16, some of them tiny."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 48, bias=bias)
    with torch.no_grad():
        layer.weight[:, ::7] *= 1e-5
    return layer.bfloat16().to(dtype).requires_grad_(False)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each product with a copy."""
    found: list[int] = []
    own = PackedCopyLinear.packed_output

    def counted(self: PackedCopyLinear, x: torch.Tensor) -> torch.Tensor | None:
        if (y := own(self, x)) is not None:
            found.append(y.numel() // y.shape[-1])
        return y

    monkeypatch.setattr(PackedCopyLinear, "packed_output", counted)
    return found


@TYPES
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (16, 1), (2, 3), (4, 32), (5,)])
@torch.no_grad()
def test_the_output_is_that_of_the_weight(
    shape: tuple[int, ...], bias: bool, dtype: torch.dtype, products: list[int]
) -> None:
    layer = plain(dtype, bias)
    x = torch.randn(*shape, 64, dtype=dtype)
    expected = layer.double()(x.double())
    y = PackedCopyLinear(plain(dtype, bias))(x)
    assert y.shape == (*shape, 48) and y.dtype == dtype and len(products) == 1
    assert (y - expected).abs().max() <= ROUNDING[dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", [BFLOAT16])
@torch.no_grad()
def test_many_and_scattered_tokens_in_bfloat16(dtype: torch.dtype, products: list[int]) -> None:
    layer, x = PackedCopyLinear(plain(dtype)), torch.randn(3, 300, 128, dtype=dtype)
    for one in (x[..., :64], x[:, -1:, ::2]):  # as an output head gets the last tokens: not contiguous
        torch.testing.assert_close(layer(one), plain(dtype)(one.contiguous()), rtol=2**-7, atol=2**-7)
    assert products == [900, 3]


@pytest.mark.parametrize("dtype", [FLOAT32])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_pytorchs_two_names_of_the_product_agree(
    bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(3, 5, 128)[:, -1:, ::2]  # as an output head gets the last tokens: not contiguous
    y = PackedCopyLinear(plain(dtype, bias))(x)
    monkeypatch.delattr(torch, "fbgemm_linear_fp16_weight_fp32_activation")
    assert torch.equal(PackedCopyLinear(plain(dtype, bias))(x), y)


@TYPES
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@torch.no_grad()
def test_a_duplicate_takes_its_own_weight(
    duplicate: Callable[[Any], Any], dtype: torch.dtype, products: list[int]
) -> None:
    layer, x = PackedCopyLinear(plain(dtype)), torch.randn(2, 64, dtype=dtype)
    assert torch.equal(duplicate(layer)(x), plain(dtype)(x)) and not products


CASES: dict[str, Callable[[Any, torch.dtype], Any]] = {
    "no axis of tokens": lambda layer, dtype: layer(torch.ones(64, dtype=dtype)),
    "no token": lambda layer, dtype: layer(torch.ones(0, 64, dtype=dtype)),
    "another type": lambda layer, _: layer.double()(torch.ones(1, 64).double()),
    "vmap": lambda layer, dtype: torch.vmap(layer)(torch.ones(3, 2, 64, dtype=dtype)),
}


@TYPES
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_other_inputs_take_the_weight(case: str, dtype: torch.dtype, products: list[int]) -> None:
    torch.testing.assert_close(CASES[case](PackedCopyLinear(plain(dtype)), dtype), CASES[case](plain(dtype), dtype))
    assert not products


@pytest.mark.parametrize("dtype", [FLOAT32])
@torch.no_grad()
def test_many_float32_tokens_take_the_weight(dtype: torch.dtype, products: list[int]) -> None:
    x = torch.ones(MOST_TOKENS[dtype] + 1, 64)
    assert torch.equal(PackedCopyLinear(plain(dtype))(x), plain(dtype)(x)) and not products


@TYPES
def test_gradients_and_autocast_take_the_weight(dtype: torch.dtype, products: list[int]) -> None:
    x = torch.randn(2, 64, requires_grad=True, dtype=dtype)
    layer = PackedCopyLinear(plain(dtype))
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
    dtype = layer.weight.dtype
    layer.weight.mul_(2)
    layer.double().to(dtype)


@TYPES
@pytest.mark.parametrize(
    "change", [in_place, through_data, as_parameter, by_state_dict, by_the_view, through_another_type]
)
@torch.no_grad()
def test_a_changed_weight_is_seen_at_once(
    change: Callable[[Any], None], dtype: torch.dtype, products: list[int]
) -> None:
    layer, x = PackedCopyLinear(plain(dtype)), torch.randn(2, 64, dtype=dtype)
    y = layer(x)
    change(layer)
    torch.testing.assert_close(layer(x), 2 * y, atol=ROUNDING[dtype] * 8, rtol=ROUNDING[dtype])
    assert len(products) == 1, "the copy is of the old weight"


@pytest.mark.parametrize("dtype", [FLOAT32])
def test_weights_that_float16_cannot_hold_have_no_copy(dtype: torch.dtype) -> None:
    assert can_copy(plain(dtype))
    for value in (70000.0, torch.nan):
        layer = plain(dtype)
        layer.weight[0, 0] = value
        assert not can_copy(layer)


@TYPES
def test_layers_that_are_not_plain_have_no_copy(dtype: torch.dtype) -> None:
    assert can_copy(plain(dtype))
    hooked = plain(dtype)
    hooked.register_forward_hook(lambda *_: None)
    for layer in (hooked, PackedCopyLinear(plain(dtype)), nn.Embedding(3, 4, dtype=dtype), plain(dtype).to("meta")):
        assert not can_copy(layer)


def test_other_types_have_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not can_copy(plain(torch.float64)) and not can_copy(plain(torch.float16))
    monkeypatch.setattr(compute_dtype, "_is_slow", lambda dtype: True)
    assert not can_copy(plain(torch.bfloat16)), "a CPU without products in bfloat16"


@pytest.mark.parametrize("dtype", [BFLOAT16])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_onednns_operation_where_there_is_no_compiled_code(
    bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(3, 5, 128).to(dtype)[:, -1:, ::2]
    y = PackedCopyLinear(plain(dtype, bias))(x)
    monkeypatch.setattr(packed_copy, "packed_product", lambda weight: None)
    calls: list[Any] = []
    operation = packed_copy._onednn()
    monkeypatch.setattr(packed_copy, "_onednn", lambda: lambda *given: calls.append(1) or operation(*given))
    torch.testing.assert_close(PackedCopyLinear(plain(dtype, bias))(x), y, rtol=2**-7, atol=2**-8)
    assert calls


@pytest.mark.parametrize("dtype", [BFLOAT16])
def test_bfloat16_without_compiled_code_and_onednn(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert can_copy(plain(dtype))
    packs_bfloat16.cache_clear()
    monkeypatch.setattr(packed_copy, "packed_product", lambda weight: None)
    monkeypatch.setattr(packed_copy, "_onednn", lambda: torch.ops.mkldnn.no_such_operation)
    try:
        assert not can_copy(plain(dtype))
    finally:
        packs_bfloat16.cache_clear()


def llama(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, tie_word_embeddings=True, **sizes))
    return model.bfloat16().to(dtype).eval()


def close(one: Any, other: Any, dtype: torch.dtype) -> None:
    """Two models' logits are the same up to rounding."""
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(one, other, atol=tolerance, rtol=1e-5)


@TYPES
@torch.no_grad()
def test_a_model_keeps_its_parameters_its_ties_and_its_numbers(dtype: torch.dtype, products: list[int]) -> None:
    model, tokens = llama(dtype), torch.arange(12).view(3, 4)
    expected, state = model(tokens).logits, model.state_dict()
    assert add_packed_copies(model, exact=dtype == torch.bfloat16) == 15
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {name: id(value.untyped_storage()) for name, value in state.items()}.keys() == model.state_dict().keys()
    close(model(tokens).logits, expected, dtype)
    assert len(products) == 15 and add_packed_copies(model) == 0
    close(copy.deepcopy(model)(tokens).logits, expected, dtype)


@pytest.mark.parametrize("dtype", [FLOAT32])
def test_exact_copies_are_those_in_bfloat16(dtype: torch.dtype) -> None:
    assert add_packed_copies(llama(dtype), exact=True) == 0


@TYPES
def test_no_copies_without_free_memory(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    weights = 2 * 4 * (4 * 32 * 32 + 3 * 32 * 48) // 2 + 2 * 60 * 32  # bytes of all copies
    for free, copies in ((2 * weights - 1, 0), (2 * weights, 15), (None, 15)):
        monkeypatch.setattr(packed_copy, "_free_memory", lambda free=free: free)
        with caplog.at_level(logging.INFO, "peftcore"):
            assert add_packed_copies(llama(dtype)) == copies
    assert caplog.text.count("no packed copies") == 1


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="this system has no /proc/meminfo")
def test_free_memory_is_that_of_this_machine() -> None:
    free = packed_copy._free_memory()
    assert free is not None and 2**20 < free < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@TYPES
@pytest.mark.parametrize("names", [None, ["a", "b", "__base__"], "a"])
@pytest.mark.parametrize("tokens", [1, 4])
@torch.no_grad()
def test_adapters_on_copied_layers_give_the_numbers_of_the_weights(
    names: Any, tokens: int, dtype: torch.dtype, products: list[int]
) -> None:
    ids = torch.arange(3 * tokens).view(3, tokens)
    outputs = []
    for copies in (False, True):
        model = with_adapters(dtype, copies)
        outputs.append(model(ids, **({} if names is None else {"adapter_names": names})).logits)
    close(outputs[1], outputs[0], dtype)
    assert len(products) == 15, "each layer by its copy"


@TYPES
@torch.no_grad()
def test_merging_ends_the_use_of_the_copies_and_unmerging_takes_it_up_again(
    dtype: torch.dtype, products: list[int]
) -> None:
    ids = torch.arange(4).view(1, 4)
    model = with_adapters(dtype, True)
    expected = model(ids).logits
    products.clear()
    with model.merged():
        close(model(ids).logits, expected, dtype)
        assert len(products) == 1, "the output head alone, which has no adapter"
    assert torch.equal(model(ids).logits, expected) and len(products) == 16


def with_adapters(dtype: torch.dtype, copies: bool) -> Any:
    model = llama(dtype)
    if copies:
        add_packed_copies(model)
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(model, config, "a")
    model.add_adapter("b", config)
    return model.eval()
