"""4-bit layers: the faster of bitsandbytes' two CPU products by the number of tokens, and nothing else changes."""

import copy
import gc
import pickle
import weakref
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import pytest
import torch
from torch import Tensor, nn

from peftcore import IA3Config, LoraConfig, get_peft_model
from peftcore.bases import base_weight, keep_quantized_weights_trainable
from peftcore.bases.quantized import MAX_PACKED_TOKENS
from peftcore.errors import TrainingError
from peftcore.injection.adapter_set import adapter_set

needs_packed_product = pytest.mark.skipif(
    not bnb_functional.has_avx512bf16(), reason="this CPU has no bfloat16 instructions, so there is one product only"
)
EPS = torch.finfo(torch.bfloat16).eps
KINDS = ["nf4", "nf4+double", "fp4", "fp4+double"]


def four_bit(kind: str = "nf4", inputs: int = 128, outputs: int = 64, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A 4-bit layer with random weights that computes in `dtype`."""
    storage, _, double = kind.partition("+")
    torch.manual_seed(0)
    made: Any = bnb.nn.Linear4bit(inputs, outputs, quant_type=storage, compute_dtype=dtype)
    made.weight = bnb.nn.Params4bit(
        torch.randn(outputs, inputs).to(dtype),
        requires_grad=False,
        quant_type=storage,
        compress_statistics=bool(double),
        module=made,
    )
    made.bias = nn.Parameter(torch.randn(outputs).to(dtype), requires_grad=False)
    return made.to("cpu").eval()


def adapted_view(layer: Any) -> Any:
    """The view of a layer that has adapters."""
    view = base_weight(layer)
    view.prepare_layer()
    return view


def net_with_adapter_below(trainable: bool = True) -> Any:
    """Two 4-bit layers, 128 -> 64 -> 128, the first one with a LoRA that changes it."""
    net = nn.Sequential(four_bit(), four_bit(inputs=64, outputs=128))
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, inference_mode=not trainable)
    return get_peft_model(net, config)


def exact(layer: Any, x: Tensor) -> Tensor:
    """x Wᵀ + b in float64, W as its codes and scales say."""
    state = copy.copy(layer.weight.quant_state)
    state.dtype = torch.float32
    weight = bnb_functional.dequantize_4bit(layer.weight.data, state).double()
    return x.double() @ weight.T + layer.bias.double()


def inputs(tokens: int, features: int = 128, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(tokens, features, generator=torch.Generator().manual_seed(tokens)).to(dtype)


@needs_packed_product
@pytest.mark.parametrize("kind", KINDS)
def test_the_packed_order_is_bitsandbytes_own(kind: str) -> None:
    layer = four_bit(kind)
    base: Any = adapted_view(layer)
    base.product(inputs(1))
    codes, state = bnb_functional._convert_weight_packed_for_cpu(
        layer.weight.data.clone(), copy.copy(layer.weight.quant_state)
    )
    assert torch.equal(base._packed.codes, codes) and torch.equal(base._packed.scales, state.absmax)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, MAX_PACKED_TOKENS, MAX_PACKED_TOKENS + 1])
def test_either_product_is_the_layer_within_the_rounding_of_bfloat16(kind: str, tokens: int) -> None:
    layer = four_bit(kind)
    base, x = adapted_view(layer), inputs(tokens)
    y, expected = base.product(x), exact(layer, x)
    assert y.dtype == torch.bfloat16
    assert (y.double() - expected).norm() < 1.5 * EPS * expected.norm()


def test_an_input_that_lies_across_memory_is_read_right() -> None:
    layer = four_bit()
    x = inputs(8).T.contiguous().T
    y, expected = adapted_view(layer).product(x), exact(layer, x)
    assert not x.is_contiguous() and (y.double() - expected).norm() < 1.5 * EPS * expected.norm()


@needs_packed_product
def test_float32_keeps_its_precision_for_a_single_token() -> None:
    layer = four_bit(dtype=torch.float32)
    base, x = adapted_view(layer), inputs(1, dtype=torch.float32)
    assert (base.product(x).double() - exact(layer, x)).norm() < 1e-6 * exact(layer, x).norm()
    assert bnb_functional.has_avx512bf16() and not base.prefers_product(x)


@pytest.mark.parametrize(("features", "outputs"), [(128, 40), (96, 64)])
def test_shapes_that_cannot_be_packed_are_computed_all_the_same(features: int, outputs: int) -> None:
    layer = four_bit(inputs=features, outputs=outputs)
    x = inputs(1, features)
    y, expected = adapted_view(layer).product(x), exact(layer, x)
    assert (y.double() - expected).norm() < 1.5 * EPS * expected.norm()


@needs_packed_product
def test_the_copy_lives_while_tokens_come_one_by_one() -> None:
    layer = four_bit()
    base: Any = adapted_view(layer)
    base.product(inputs(1))
    codes = weakref.ref(base._packed.codes)
    base.product(inputs(2))
    assert base._packed.codes is codes()  # made once
    base.product(inputs(MAX_PACKED_TOKENS + 1))
    gc.collect()
    assert base._packed is None and codes() is None
    base.product(inputs(1))
    layer.train()
    base.product(inputs(1))
    assert base._packed is None
    assert pickle.loads(pickle.dumps(base))._packed is None


@needs_packed_product
def test_a_weight_that_was_changed_in_place_is_packed_again() -> None:
    layer = four_bit()
    base, x = adapted_view(layer), inputs(1)
    before = base.product(x)
    with torch.no_grad():
        layer.weight.copy_(four_bit("fp4").weight.flip(0))
    after = base.product(x)
    expected = exact(layer, x)
    assert not torch.equal(after, before)
    assert (after.double() - expected).norm() < 1.5 * EPS * expected.norm()


def other_memory(layer: Any, other: Any) -> None:
    """Several times, so that memory which was freed is given out again."""
    for codes in [torch.randint_like(layer.weight.data, 256) for _ in range(9)] + [other.weight.data]:
        layer.weight.data = codes.clone()


def other_scales(layer: Any, other: Any) -> None:
    layer.weight.quant_state = layer.quant_state = other.weight.quant_state


def edited_through_data(layer: Any, other: Any) -> None:
    layer.weight.data.copy_(other.weight.data.flip(0))


@needs_packed_product
@pytest.mark.parametrize("change", [other_memory, other_scales, edited_through_data])
def test_a_weight_that_was_changed_otherwise_is_packed_again(change: Any) -> None:
    net, layer = adapted(IA3Config(target_modules=["0"], feedforward_modules=[]))
    other: Any = four_bit()
    with torch.no_grad():
        other.weight = bnb.nn.Params4bit(3 * torch.randn(64, 128).bfloat16(), requires_grad=False, module=other).to(
            "cpu"
        )
        before = net(inputs(1))
        change(layer, other)
        if change is edited_through_data:  # which nothing shows
            net.refresh_adapters()
        after, expected = net(inputs(1)), exact(layer, inputs(1))
    assert (before.double() - expected).norm() > 0.1 * expected.norm()
    assert (after.double() - expected).norm() < 1.5 * EPS * expected.norm()


# -- adapted models --------------------------------------------------------------------------------------------------


def adapted(config: Any = None) -> tuple[Any, Any]:
    """A model of one 4-bit layer with an adapter, and the layer."""
    layer = four_bit("nf4+double")
    config = config or LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    return get_peft_model(nn.Sequential(layer), config).eval(), layer


@torch.no_grad()
def test_decoding_leaves_the_layer_as_it_was() -> None:
    net, layer = adapted()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    dense = net[0].base.read().clone()
    net(inputs(1))
    with net.disable_adapter():
        net(inputs(1))
    after = layer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(net[0].base.read(), dense)
    weight = layer.weight
    net.merge_adapter()
    net.unmerge_adapter()
    assert layer.weight is weight and torch.equal(net[0].base.read(), dense)


@needs_packed_product
@torch.no_grad()
def test_a_merged_weight_acts_at_once_and_is_let_go_of() -> None:
    net, layer = adapted()
    x, unmerged = inputs(1), net(inputs(1))
    net.merge_adapter()
    merged, expected = net(x), exact(layer, x)
    assert (merged.double() - expected).norm() < 1.5 * EPS * expected.norm()
    weight = weakref.ref(layer.weight)
    net.unmerge_adapter()
    assert torch.equal(net(x), unmerged)
    gc.collect()
    assert weight() is None


@needs_packed_product
@pytest.mark.parametrize("config", [None, IA3Config(target_modules=["0"], feedforward_modules=[])])
def test_every_method_decodes_through_the_packed_product(config: Any) -> None:
    net, layer = adapted(config)
    x = inputs(1)
    with torch.no_grad():
        y = net(x)
    assert net[0].base._packed is not None
    adapter = adapter_set(net).adapters("default")["0"]
    expected = x.double() @ adapter.merged_weight(net[0].base.read().float()).double().T
    expected = expected + adapter.merged_bias(layer.bias).double()
    assert (y.double() - expected).norm() < 3 * EPS * expected.norm()


def test_it_can_be_trained_after_it_has_been_evaluated() -> None:
    net, _ = adapted(IA3Config(target_modules=["0"], feedforward_modules=[]))
    for tokens in (1, 40):
        net.eval()
        with torch.no_grad():
            net(inputs(tokens))
        net.train()
        x = inputs(tokens).requires_grad_()
        net(x).sum().backward()
        weight = net[0].base.read()
        torch.testing.assert_close(x.grad, weight.sum(0).expand_as(x), rtol=0.05, atol=0.2)


def test_a_merged_eight_bit_model_from_a_pickle_unmerges_to_the_bit() -> None:
    torch.manual_seed(0)
    layer: Any = bnb.nn.Linear8bitLt(48, 33, has_fp16_weights=False)
    layer.load_state_dict(nn.Linear(48, 33).state_dict())
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model: Any = get_peft_model(nn.Sequential(layer.to("cpu")), config).eval()
    x = torch.randn(3, 48, dtype=torch.float16)
    with torch.no_grad():
        before = model(x)
        model.merge_adapter()
        copy = pickle.loads(pickle.dumps(model))  # torch pickles the weight as an ordinary parameter
        assert torch.equal(copy(x), model(x))
        copy.unmerge_adapter()
        assert torch.equal(copy(x), before)


# -- layers without adapters -----------------------------------------------------------------------------------------


def test_a_view_alone_leaves_the_layer_as_it_is() -> None:
    layer = four_bit()
    before = dict(vars(layer))
    base_weight(layer)
    assert type(layer) is bnb.nn.Linear4bit and vars(layer) == before


@needs_packed_product
def test_a_frozen_adapter_leaves_the_other_layers_to_bitsandbytes() -> None:
    model = net_with_adapter_below(trainable=False).eval()
    other = model.base_model.model[1]
    with torch.no_grad():
        model(inputs(1))
    assert type(other) is bnb.nn.Linear4bit and other.weight.quant_state.packing_format_for_cpu


@pytest.mark.parametrize("tokens", [1, MAX_PACKED_TOKENS + 1])
def test_an_adapter_that_trains_gets_the_same_gradient_after_an_evaluation(tokens: int) -> None:
    model, x = net_with_adapter_below(), inputs(tokens)

    def gradients() -> list[Tensor]:
        model.train().zero_grad()
        model(x).square().sum().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    before = gradients()
    other = model.base_model.model[1]
    codes = other.weight.data.clone()
    with torch.no_grad():
        model.eval()(x)
    after = gradients()
    assert not hasattr(other, "_view") or other._view._packed is None  # no copy takes memory in training
    assert torch.equal(other.weight.data, codes)
    assert before and all(one.any() and torch.equal(one, two) for one, two in zip(before, after, strict=True))


@needs_packed_product
@pytest.mark.parametrize("tokens", [1, MAX_PACKED_TOKENS, MAX_PACKED_TOKENS + 1])
def test_a_layer_that_keeps_its_codes_multiplies_few_tokens_by_a_copy(tokens: int) -> None:
    layer, x = four_bit(), inputs(tokens)
    codes = layer.weight.data.clone()
    keep_quantized_weights_trainable(layer)
    with torch.no_grad():
        layer(inputs(1))
        y, expected = layer(x), exact(layer, x)
    assert torch.equal(layer.weight.data, codes) and y.dtype == torch.bfloat16
    assert (y.double() - expected).norm() < 1.5 * EPS * expected.norm()
    assert (layer._view._packed is not None) == (tokens <= MAX_PACKED_TOKENS)


@needs_packed_product
def test_copies_and_files_of_a_layer_that_keeps_its_codes_hold_no_packed_copy() -> None:
    layer, x = four_bit(), inputs(1)
    keep_quantized_weights_trainable(layer)
    with torch.no_grad():
        y = layer(x)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert type(other) is type(layer) and "_view" not in vars(other)
            assert torch.equal(other(x), y)


@needs_packed_product
def test_a_kept_layer_sees_a_new_weight() -> None:
    layer, x = four_bit(), inputs(1)
    keep_quantized_weights_trainable(layer)
    with torch.no_grad():
        layer(x)
        layer.weight = four_bit("fp4").weight
        y, expected = layer(x), exact(layer, x)
    assert (y.double() - expected).norm() < 1.5 * EPS * expected.norm()


@needs_packed_product
def test_a_merged_model_decodes_through_the_packed_product_and_keeps_its_codes() -> None:
    model = net_with_adapter_below().merge_and_unload().eval()
    codes = [layer.weight.data.clone() for layer in model]
    with torch.no_grad():
        model(inputs(1))
    assert all(layer._view._packed is not None for layer in model)
    assert all(torch.equal(layer.weight.data, one) for layer, one in zip(model, codes, strict=True))


@needs_packed_product
def test_a_kept_layer_in_eval_mode_has_the_gradient_of_its_input() -> None:
    layer = four_bit()
    keep_quantized_weights_trainable(layer)
    x = inputs(1).requires_grad_()
    layer(x).float().sum().backward()
    state = copy.copy(layer.weight.quant_state)
    state.dtype = torch.float32
    expected = bnb_functional.dequantize_4bit(layer.weight.data, state).sum(0)
    assert x.grad is not None and (x.grad[0].float() - expected).norm() < 2 * EPS * expected.norm()


def test_a_packed_layer_is_refused_for_training_and_no_layer_is_changed() -> None:
    net = nn.Sequential(four_bit(), four_bit())
    net[1].weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(TrainingError, match=r"1: .* has packed this 4-bit layer"):
        keep_quantized_weights_trainable(net)
    assert type(net[0]) is bnb.nn.Linear4bit
