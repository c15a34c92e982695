"""What the GraLoRA paper says of its blocks, and what GraLoRA must refuse."""

import pytest
import torch
from dropout_facts import assert_dropout_keeps_the_mean
from method_example import Example, randomise
from torch import nn

from peftcore import ConfigError, get_peft_model
from peftcore.methods.gralora import GraloraConfig

EXAMPLE = Example(
    GraloraConfig,
    options={"r": 4, "alpha": 8, "gralora_k": 2},
    layers={"Conv1D": {"hybrid_r": 3}, "Linear without bias": {"gralora_k": 4}},
    theirs="GraloraConfig",
    parity={
        "plain": {"r": 8, "alpha": 8},
        "four blocks": {"r": 8, "alpha": 12, "gralora_k": 4},
        "hybrid": {"r": 4, "alpha": 8, "hybrid_r": 3},
        "biases": {"r": 4, "alpha": 8, "bias": "gralora_only"},
    },
    families=("gpt2", "llama", "bert", "t5"),
)


def test_every_block_is_a_lora_of_its_own() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8, bias=False)).double()
    weight = net[0].weight.clone()
    net = get_peft_model(net, GraloraConfig(r=4, hybrid_r=1, alpha=10, target_modules=["0"], init_weights=False))
    adapter = net[0].adapters["default"]
    a, b, s = adapter.gralora_A, adapter.gralora_B, 10 / (4 + 1)
    expected = weight + s * adapter.general_B @ adapter.general_A
    for j in range(2):
        for n in range(2):
            block = b[j, 2 * n : 2 * n + 2].T @ a[n, :, 2 * j : 2 * j + 2].T
            rows, columns = slice(4 * j, 4 * j + 4), slice(3 * n, 3 * n + 3)
            expected[rows, columns] = expected[rows, columns] + s * block
    torch.testing.assert_close(net(torch.eye(6, dtype=torch.float64)).T, expected, rtol=1e-12, atol=1e-12)


def test_rank_grows_with_k_and_parameters_do_not() -> None:
    torch.manual_seed(0)
    counts = set()
    for k in (1, 2, 4):
        config = GraloraConfig(r=4, gralora_k=k, target_modules=["0"], init_weights=False)
        net = get_peft_model(nn.Sequential(nn.Linear(32, 32)).double(), config)
        assert torch.linalg.matrix_rank(net[0].adapters["default"].delta_weight()) == 4 * k
        counts.add(net.get_nb_trainable_parameters()[0])
    assert counts == {4 * (32 + 32)}


def test_any_shape_of_input() -> None:
    torch.manual_seed(0)
    net = get_peft_model(nn.Sequential(nn.Linear(6, 8)).double(), GraloraConfig(r=4, target_modules=["0"]))
    randomise(net, 0.3)
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    expected = net(x.reshape(24, 6))
    torch.testing.assert_close(net(x).reshape(24, 8), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(net(x[0, 0, 0]), expected[0], rtol=1e-12, atol=1e-12)


def test_start_values() -> None:
    config = GraloraConfig(r=8, hybrid_r=4, target_modules=["0"])
    adapter = get_peft_model(nn.Sequential(nn.Linear(2000, 2000)), config)[0].adapters["default"]
    assert adapter.gralora_B.abs().max() == 0 and adapter.general_B.abs().max() == 0
    for factor, inputs in ((adapter.gralora_A, 1000), (adapter.general_A, 2000)):  # variance of U(±1/√inputs)
        assert abs(factor.var() * 3 * inputs - 1) < 0.1


def test_dropout_acts_while_training_only_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    config = GraloraConfig(r=4, hybrid_r=2, gralora_dropout=0.4, target_modules=["0"], init_weights=False)
    net = get_peft_model(nn.Sequential(nn.Linear(64, 4, bias=False)).double(), config)
    x = torch.randn(1, 64, dtype=torch.float64)
    assert_dropout_keeps_the_mean(net, x)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"r": 0}, "r must be a positive integer; got 0"),
        ({"gralora_k": 0}, "gralora_k must be a positive integer; got 0"),
        ({"hybrid_r": -1}, "hybrid_r must be 0 or a positive integer; got -1"),
        ({"r": 5, "gralora_k": 4}, "r must be a multiple of gralora_k=4, got 5; try 8"),
        ({"gralora_dropout": 1.0}, "below 1; got 1.0"),
        ({"bias": "lora_only"}, "gralora_only"),
        ({"r": 4, "gralora_k": 4}, "gralora_k must divide 6 and 8 at 0, got 4; try 2"),
    ],
)
def test_impossible_options(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_peft_model(nn.Sequential(nn.Linear(6, 8)), GraloraConfig(target_modules=["0"], **options))
