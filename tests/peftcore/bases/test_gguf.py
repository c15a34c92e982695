"""A layer in GGUF blocks computes and learns like its dense twin, and keeps its blocks."""

import copy
import pickle
from typing import Any

import pytest
import torch
from quantised_layers import gguf_linear, quantised, random_rows
from torch import Tensor, nn

from peftcore import LoraConfig, MergeError, get_peft_model
from peftcore.bases import GgufLinear, base_weight
from peftcore.bases.gguf_blocks import FORMATS
from peftcore.injection.adapter_set import adapter_set


def k_layer(kind: str = "Q4_K") -> GgufLinear:
    return gguf_linear(kind, random_rows(kind, 16, 256) // 8 * 8, torch.randn(16))


def dense(layer: GgufLinear) -> nn.Linear:
    twin = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    twin.weight.data = layer.dequantized()
    if layer.bias is not None:
        twin.bias.data = layer.bias.data
    return twin.requires_grad_(False)


def adapted(layer: GgufLinear, **options: Any) -> Any:
    torch.manual_seed(1)
    options = {"r": 4, "target_modules": ["0"], "init_lora_weights": False, **options}
    return get_peft_model(nn.Sequential(layer), LoraConfig(**options)).eval()


@pytest.mark.parametrize("kind", FORMATS)
def test_output_and_gradient_are_those_of_the_dense_layer(kind: str) -> None:
    layer = gguf_linear(kind, random_rows(kind, 16, 256), torch.randn(16))
    outputs, gradients = [], []
    for each in (layer, dense(layer).double()):
        x = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
        y = each(x)
        y.square().sum().backward()
        outputs.append(y)
        gradients.append(x.grad)
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_gradients_of_gradients() -> None:
    layer = quantised("Q4_1").double()
    assert torch.autograd.gradgradcheck(lambda x: layer(x).sin(), torch.randn(2, 64).double().requires_grad_())


def test_nothing_dense_is_saved_for_the_backward_pass() -> None:
    layer, saved = quantised("Q4_1"), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(3, 64).requires_grad_())
    assert saved and not [t for t in saved if t.is_floating_point() and t.numel() >= layer.out_features * 32]


def test_casts_move_everything_but_the_blocks() -> None:
    layer = quantised("Q4_1")
    before = layer.weight.clone()
    for cast in (layer.to(torch.bfloat16), layer.half(), layer.double()):
        assert cast.weight.dtype == torch.uint8 and torch.equal(cast.weight, before)
    x = torch.randn(2, 64)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_copies_pickles_and_state_dicts_hold_the_blocks() -> None:
    layer, x = quantised("Q5_0"), torch.randn(2, 64)
    loaded = GgufLinear(64, 32, "Q5_0")
    loaded.load_state_dict(layer.state_dict())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert torch.equal(twin(x), layer(x)) and twin.weight is not layer.weight
        assert not twin.weight.requires_grad


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_a_merged_weight_is_stored_in_the_same_format(kind: str) -> None:
    model = adapted(quantised(kind))
    layer, before = model[0].base_layer, model[0].base_layer.weight
    wanted = adapter_set(model).adapters("default")["0"].merged_weight(layer.dequantized())
    model.merge_adapter()
    merged = layer.dequantized()
    step = (wanted.unflatten(1, (-1, 32)).abs().amax(2) * 2 / 2 ** (FORMATS[kind].code_bits - 1)).max()
    assert layer.weight.shape == before.shape and not torch.equal(layer.weight, before)
    assert (merged - wanted).abs().max() < step
    model.unmerge_adapter()
    assert layer.weight is before


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_a_format_without_a_quantiser_refuses_a_merge_and_stays(kind: str) -> None:
    model, x = adapted(k_layer(kind)), torch.randn(2, 256)
    before, blocks = model(x), model[0].base_layer.weight
    with pytest.raises(MergeError, match=rf"{kind}: the gguf package has no quantiser.*dequantize"):
        model.merge_adapter()
    assert model[0].base_layer.weight is blocks and torch.equal(model(x), before)


def test_a_merge_beyond_half_precision_is_refused() -> None:
    model = adapted(quantised("Q8_0"), lora_alpha=10**10)
    blocks = model[0].base_layer.weight
    with pytest.raises(MergeError, match="half precision"):
        model.merge_adapter()
    assert model[0].base_layer.weight is blocks


def test_rows_with_different_adapters_equal_those_rows_alone() -> None:
    model = adapted(k_layer())
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    x, names = torch.randn(3, 5, 256), ["default", "other", "__base__"]
    with torch.no_grad():
        mixed = model(x, adapter_names=names)
        for row, name in enumerate(names):
            alone = model(x[row : row + 1], adapter_names=[name])
            torch.testing.assert_close(mixed[row : row + 1], alone, rtol=1e-4, atol=1e-4)


def test_the_fused_step_is_that_of_the_dense_base() -> None:
    results = []
    for base in (k_layer(), dense(k_layer())):
        base.bias = nn.Parameter(torch.zeros(16), requires_grad=False)
        model = adapted(base)  # type: ignore[arg-type]
        x = torch.randn(6, 256, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = model.train()(x)
        y.sin().sum().backward()
        gradients: list[Tensor] = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([y, x.grad, *gradients])
    assert len(results[0]) == 4
    for packed, plain in zip(*results, strict=True):
        torch.testing.assert_close(packed, plain, rtol=1e-4, atol=1e-3)


def test_counts_and_status_tell_the_storage() -> None:
    model = adapted(quantised("Q4_1"))
    assert model.get_nb_trainable_parameters() == (4 * (64 + 32), 64 * 32 + 32 + 4 * (64 + 32))
    assert model.get_layer_status()[0].quantization_backend == "gguf Q4_1"


def test_a_trained_bias_is_left_to_the_layer() -> None:
    layer = quantised("Q4_1")
    x = torch.randn(2, 64)
    assert base_weight(layer).compute_dtype(x) == torch.float32
    layer.bias.requires_grad_()
    assert base_weight(layer).compute_dtype(x) is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # dynamo's own
def test_it_compiles_into_one_graph() -> None:
    torch._dynamo.reset()
    model = adapted(k_layer())
    x = torch.randn(3, 256)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-3)
    compiled(x.requires_grad_()).sum().backward()
    assert x.grad is not None and model[0].lora_A["default"].weight.grad is not None


def test_inference_mode_and_recomputation_give_the_same_output() -> None:
    model, x = adapted(k_layer()), torch.randn(3, 256)
    expected = model(x)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-3)
    x.requires_grad_()
    y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    y.sum().backward()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-3)
    assert x.grad is not None
