"""What the FedPara paper and LyCORIS say of LoHa."""

from typing import Any

import pytest
import torch
from layer_parity import agrees_with_peft
from method_example import Example, randomise
from torch import nn

from peftcore import ConfigError, get_peft_model
from peftcore.injection.adapter_set import adapter_set
from peftcore.methods.loha import LoHaConfig

PATTERNS = {"rank_pattern": {"q_proj|query": 3, "lm_head": 1}, "alpha_pattern": {r".*(down_proj|dense)": 20}}
EXAMPLE = Example(
    LoHaConfig,
    options={"r": 2, "alpha": 6},
    layers={
        "Linear without bias": {"r": 5},  # r² above the layer's size: ΔW itself
        "Conv1d": {"use_effective_conv2d": True},
        "Conv2d": {"use_effective_conv2d": True, "r": 4},
    },
    theirs="LoHaConfig",
    parity={"small rank": {"r": 2, "alpha": 5}, "large rank": {"r": 8}, "patterns": {"r": 2, **PATTERNS}},
    targets={"gpt2": ["lm_head"]},  # PEFT's LoHa knows no Conv1D
)


def adapted(layer: nn.Module, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    net = get_peft_model(nn.Sequential(layer).double(), LoHaConfig(target_modules=["0"], **options))
    randomise(net, 0.3)
    return net, adapter_set(net).adapters("default")["0"]


@pytest.mark.parametrize("r", [2, 5])
def test_the_papers_formula(r: int) -> None:
    layer, x = nn.Linear(12, 9).double(), torch.randn(4, 12, dtype=torch.float64)
    weight, bias = layer.weight.clone(), layer.bias.clone()
    net, a = adapted(layer, r=r, alpha=3)
    assert a.as_product == (r == 2)
    delta = (a.hada_w1_a @ a.hada_w1_b) * (a.hada_w2_a @ a.hada_w2_b)
    torch.testing.assert_close(net(x), x @ (weight + 3 / r * delta).T + bias, rtol=1e-12, atol=1e-12)


def test_rank_is_up_to_the_square() -> None:
    _, a = adapted(nn.Linear(20, 20), r=3)
    assert torch.linalg.matrix_rank(a.delta_weight()) == 9


@pytest.mark.parametrize("r", [2, 5])
def test_gradients_match_autograd_of_the_dense_form(r: int) -> None:
    net, _ = adapted(nn.Linear(12, 9), r=r)
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    parameters = [p for p in net.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(lambda *_: net(x), (x, *parameters))


@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize(
    "layer, x",
    [
        (nn.Conv1d(6, 8, 3, padding=1, stride=2), torch.randn(2, 6, 9)),
        (nn.Conv2d(6, 8, (3, 5), padding=2, dilation=2), torch.randn(2, 6, 9, 9)),
        (nn.Conv2d(6, 8, 3, groups=2), torch.randn(2, 6, 5, 5)),
        (nn.Conv2d(6, 8, 1), torch.randn(2, 6, 5, 5)),
    ],
    ids=["Conv1d", "Conv2d", "Conv2d grouped", "Conv2d 1x1"],
)
def test_convolutions(layer: nn.Module, x: torch.Tensor, effective: bool, tmp_path: Any) -> None:
    agrees_with_peft(layer, x, "LoHaConfig", LoHaConfig, {"r": 3, "use_effective_conv2d": effective}, tmp_path)


def test_start_values() -> None:
    for random in (False, True):
        net = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoHaConfig(target_modules=["0"], init_weights=not random))
        a: Any = adapter_set(net).adapters("default")["0"]
        assert (a.delta_weight().abs().max() > 0) == random
        assert all(p.abs().max() > 0 for name, p in a.named_parameters() if name != "hada_w2_b")


@pytest.mark.parametrize("r", [2, 5])
def test_dropping_rows_acts_while_training_only_and_keeps_the_sum_of_weights(r: int) -> None:
    net, _ = adapted(nn.Linear(12, 9), r=r, rank_dropout=0.4)
    x = torch.randn(1, 12, dtype=torch.float64)
    base = net[0].base_layer(x)
    whole = net.eval()(x) - base
    net.train()
    factors = torch.cat([(net(x) - base) / whole for _ in range(50)])  # each row of ΔW times 0 or rows/kept
    kept = (factors.abs() > 1e-9).double()
    torch.testing.assert_close(factors, kept * 9 / kept.sum(1, keepdim=True).clamp(min=1), rtol=1e-6, atol=1e-6)
    assert 0.5 < kept.mean() < 0.7
    net.merge_adapter()
    torch.testing.assert_close(net(x) - base, whole)


@pytest.mark.parametrize("r", [2, 5])
def test_dropping_the_module_leaves_the_base_and_still_gives_gradients(r: int) -> None:
    net, a = adapted(nn.Linear(12, 9), r=r, module_dropout=0.5)
    x = torch.randn(1, 12, dtype=torch.float64)
    base, whole = net[0].base_layer(x), net.eval()(x)
    net.train()
    draws = [net(x) for _ in range(60)]
    dropped = [bool(torch.allclose(y, base)) for y in draws]
    assert 10 < sum(dropped) < 50
    assert all(torch.allclose(y, whole) for y, gone in zip(draws, dropped, strict=True) if not gone)
    draws[dropped.index(True)].sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in a.parameters())


def test_impossible_options() -> None:
    for options, message in (({"r": 0}, "positive integer; got 0"), ({"rank_dropout": 1.5}, "below 1; got 1.5")):
        with pytest.raises(ConfigError, match=message):
            LoHaConfig(**options)
