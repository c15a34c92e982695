"""What every quantised layer of another package gets: gradients, types, and the notice of a changed weight."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftcore import IA3Config, LoraConfig, get_peft_model, prepare_model_for_kbit_training
from peftcore.bases.quantized_linear import QuantizedLinear
from peftcore.bases.storages import register_storage


class HalvesLinear(nn.Module):
    """A layer whose weight is multiples of a half, and whose forward has no gradient."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.in_features, self.out_features, self.dtype = inputs, outputs, dtype
        self.weight = nn.Parameter(torch.randint(-4, 5, (outputs, inputs), dtype=torch.int8), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(outputs, dtype=dtype))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(self.dtype) / 2, self.bias)


@register_storage(f"{__name__.partition('.')[0]}.HalvesLinear")
class HalvesWeight(QuantizedLinear):
    @property
    def dtype(self) -> torch.dtype:
        return self.layer.dtype

    def codes(self, state: Mapping[str, Any]) -> Tensor:
        return state["weight"]

    def read_from(self, state: Mapping[str, Any]) -> Tensor:
        return state["weight"].to(self.dtype) / 2

    def write(self, weight: Tensor) -> None:
        self.restore({"weight": nn.Parameter((2 * weight).round().to(torch.int8), requires_grad=False)})


def frozen(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return HalvesLinear(6, 4, dtype).requires_grad_(False)


def test_a_forward_without_gradient_gets_the_gradient_of_the_dense_weight() -> None:
    base, x = HalvesWeight(frozen()), torch.randn(3, 6, requires_grad=True)
    assert base.prefers_product(x)
    y = base.product(x)
    assert torch.equal(y, base.layer(x))
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    torch.testing.assert_close(gradient, 2 * y @ base.read())
    (second,) = torch.autograd.grad(gradient.sum(), x)
    torch.testing.assert_close(second, 2 * (base.read().sum(1) @ base.read()).expand(3, 6))


@pytest.mark.parametrize(
    "config",
    [LoraConfig(r=2, target_modules=["0", "1"]), IA3Config(target_modules=["0", "1"], feedforward_modules=[])],
)
def test_a_chain_of_such_layers_trains_to_the_first(config: Any) -> None:
    lower, upper = frozen(), HalvesLinear(4, 4).requires_grad_(False)
    model, x = get_peft_model(nn.Sequential(lower, upper), config), torch.randn(3, 6)
    model(x).square().sum().backward()
    plain = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4)).requires_grad_(False)
    for layer, quantised in zip(plain, (lower, upper), strict=True):
        layer.weight, layer.bias = nn.Parameter(quantised.weight.float() / 2), quantised.bias
    expected = get_peft_model(plain, config)
    expected.load_state_dict({k: v for k, v in model.state_dict().items() if "base_layer" not in k}, strict=False)
    expected(x).square().sum().backward()
    wanted = dict(expected.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, wanted[name].grad)


def test_the_layer_computes_in_the_dtype_of_its_weight() -> None:
    base = HalvesWeight(frozen(torch.bfloat16))
    assert base.activation_dtype == base.compute_dtype(torch.ones(1, 6, dtype=torch.bfloat16)) == torch.bfloat16
    assert base.compute_dtype(torch.ones(1, 6)) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert base.compute_dtype(torch.ones(1, 6)) == torch.bfloat16
        assert base.product(torch.ones(1, 6, requires_grad=True)).dtype == torch.bfloat16
    base.layer.bias.requires_grad_()
    assert base.compute_dtype(torch.ones(1, 6, dtype=torch.bfloat16)) is None, "a product has no gradient of the bias"


def test_preparing_for_training_keeps_the_dtype_of_its_inputs() -> None:
    norm = nn.LayerNorm(6, dtype=torch.bfloat16)
    model: Any = nn.Sequential(norm, frozen(torch.bfloat16))
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    assert norm.weight.dtype == torch.bfloat16 and not norm.weight.requires_grad
    assert model(torch.ones(2, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
    prepare_model_for_kbit_training(nn.Sequential(norm), use_gradient_checkpointing=False)
    assert norm.weight.dtype == torch.float32


def test_a_changed_weight_is_noticed() -> None:
    base = HalvesWeight(frozen())
    first = base.unmerged_version()
    assert first == base.unmerged_version()
    base.layer.weight += 1
    assert first != base.unmerged_version()
    second = base.unmerged_version()
    base.write(base.read())
    assert second != base.unmerged_version()
