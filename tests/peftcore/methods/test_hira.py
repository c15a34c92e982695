"""What the HiRA paper says, and what HiRA must refuse."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from dropout_facts import assert_dropout_keeps_the_mean
from layer_parity import agrees_with_peft, peft
from method_example import Example, randomise
from torch import Tensor, nn

from peftcore import ConfigError, PeftModel, get_peft_model
from peftcore.methods.hira import HiraConfig

EXAMPLE = Example(
    HiraConfig,
    options={"r": 4},
    theirs="HiraConfig",
    parity={
        "plain": {"r": 4},
        "random": {"r": 4, "init_weights": False},
    },
    families=("gpt2", "llama", "bert", "t5", "vit"),
)


def test_the_papers_formula() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5)).double()
    weight, bias = net[0].weight.clone(), net[0].bias.clone()
    net = get_peft_model(net, HiraConfig(r=2, target_modules=["0"], init_weights=False))
    adapter, x = net[0].adapters["default"], torch.randn(4, 6, dtype=torch.float64)
    expected = x @ (weight + weight * (adapter.hira_B @ adapter.hira_A)).T + bias
    torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)


def test_the_change_has_a_higher_rank_than_its_factors() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16)).double()
    net = get_peft_model(net, HiraConfig(r=2, target_modules=["0"], init_weights=False))
    change = net[0].adapters["default"].delta_weight()
    assert torch.linalg.matrix_rank(change) == 16


def test_the_second_adapter_multiplies_the_first_weight_not_the_merged_one() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5, bias=False)).double()
    weight = net[0].weight.clone()
    config = HiraConfig(r=2, target_modules=["0"], init_weights=False)
    net = get_peft_model(net, config)
    net.add_adapter("other", config)
    products = [a.hira_B @ a.hira_A for a in net[0].adapters._modules.values()]
    net.set_adapter(["default", "other"])
    net.merge_adapter(["default"])
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(net(x), x @ (weight * (1 + products[0] + products[1])).T, rtol=1e-12, atol=1e-12)


def test_grouped_convolution_and_scaled_embedding() -> None:
    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * self.embed_scale

    torch.manual_seed(0)
    cases: list[tuple[nn.Module, Tensor]] = [
        (nn.Conv2d(6, 8, 3, groups=2), torch.randn(2, 6, 9, 9, dtype=torch.float64)),
        (Scaled(20, 8), torch.randint(0, 20, (3, 5))),
    ]
    for layer, x in cases:
        net: Any = get_peft_model(nn.Sequential(layer).double(), HiraConfig(r=2, target_modules=["0"]))
        before = net(x).detach()
        randomise(net, 0.5)
        adapted = net(x)
        assert (adapted - before).abs().max() > 1e-2
        net.merge_adapter()
        torch.testing.assert_close(net(x), adapted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["Conv1d", "Conv2d", "Conv2d 1x1", "Conv3d", "Embedding"])
def test_parity_on_convolutions_and_embeddings(kind: str, tmp_path: Path) -> None:
    layers: dict[str, tuple[nn.Module, Tensor]] = {
        "Conv1d": (nn.Conv1d(6, 8, 3, padding=1, stride=2), torch.randn(2, 6, 9)),
        "Conv2d": (nn.Conv2d(6, 8, (3, 5), padding=2), torch.randn(2, 6, 9, 9)),
        "Conv2d 1x1": (nn.Conv2d(6, 8, 1), torch.randn(2, 6, 9, 9)),
        "Conv3d": (nn.Conv3d(4, 8, 2), torch.randn(2, 4, 5, 5, 5)),
        "Embedding": (nn.Embedding(20, 8), torch.randint(0, 20, (3, 5))),
    }
    agrees_with_peft(*layers[kind], "HiraConfig", HiraConfig, {"r": 4}, tmp_path, spread=0.5)


def test_rank_pattern_also_where_peft_forgot_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, options = nn.Sequential(nn.Linear(6, 8)), {"r": 4, "rank_pattern": {"0": 2}, "target_modules": ["0"]}
    own = get_peft_model(copy.deepcopy(net), HiraConfig(**options))
    assert own[0].adapters["default"].hira_A.shape == (2, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hf = peft.get_peft_model(copy.deepcopy(net), peft.HiraConfig(**copy.deepcopy(options)))
        randomise(hf, 0.5)
        hf.save_pretrained(tmp_path)
    x = torch.randn(3, 6)
    torch.testing.assert_close(PeftModel.from_pretrained(copy.deepcopy(net), tmp_path)(x), hf(x))


def test_start_values() -> None:
    net = nn.Sequential(nn.Linear(4000, 8))
    net = get_peft_model(net, HiraConfig(r=4, init_weights="gaussian", target_modules=["0"]))
    adapter = net[0].adapters["default"]
    assert adapter.hira_B.abs().max() == 0 and abs(adapter.hira_A.std().item() * 4 - 1) < 0.05
    net = get_peft_model(nn.Sequential(nn.Embedding(50, 8)), HiraConfig(r=4, target_modules=["0"]))
    adapter = net[0].adapters["default"]
    assert adapter.hira_A.abs().max() == 0 and adapter.hira_B.std() > 0.5


def test_dropout_acts_while_training_only_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 4, bias=False)).double()
    net = get_peft_model(net, HiraConfig(r=4, hira_dropout=0.4, target_modules=["0"], init_weights=False))
    x = torch.randn(1, 64, dtype=torch.float64)
    assert_dropout_keeps_the_mean(net, x)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"r": 0}, "r must be a positive integer; got 0"),
        ({"hira_dropout": 1.0}, "below 1; got 1.0"),
        ({"init_weights": "pissa"}, "True, False or 'gaussian'; got 'pissa'"),
    ],
)
def test_impossible_options(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HiraConfig(**options)
