"""What the C3A paper says: blocks of circular convolutions, whose rank is not bound by the number of parameters."""

import math
from typing import Any

import pytest
import torch
from method_example import Example, randomise
from torch import nn

from peftcore import ConfigError, get_peft_model
from peftcore.injection.adapter_set import adapter_set
from peftcore.methods.c3a import C3AConfig

EXAMPLE = Example(
    C3AConfig,
    options={"block_size": 4},
    starts_at_base=False,
    theirs="C3AConfig",
    parity={
        "plain": {"block_size": 16},
        "pattern": {"block_size": 16, "block_size_pattern": {"down_proj": 8, "1.intermediate.dense": 4}},
        "biases": {"block_size": 8, "bias": "c3a_only", "init_weights": True},
    },
    spread=3.0,
    families=("llama", "bert", "vit"),  # PEFT's C3A knows no Conv1D
)


def net(i: int = 15, o: int = 10, **options: Any) -> Any:
    torch.manual_seed(0)
    config = C3AConfig(**{"block_size": 5, "target_modules": ["0"], **options})
    return get_peft_model(nn.Sequential(nn.Linear(i, o)).double(), config)


def c3a_at(model: Any) -> Any:
    return adapter_set(model).adapters("default")["0"]


@pytest.mark.parametrize("block", [1, 2, 5, 6], ids=str)
def test_the_papers_formula(block: int) -> None:
    """Entry by entry: block (m, n) is circulant with first row kernel[m, n], all over the number of inputs."""
    i, o = 3 * block, 2 * block
    model = net(i, o, block_size=block)
    kernel, layer = c3a_at(model).c3a_kernel, model[0].base_layer
    delta = torch.empty(o, i, dtype=torch.float64)
    for row in range(o):
        for column in range(i):
            (m, t), (n, j) = divmod(row, block), divmod(column, block)
            delta[row, column] = kernel[m, n, (j - t) % block] / i
    torch.testing.assert_close(c3a_at(model).delta_weight(), delta, rtol=1e-12, atol=1e-12)
    x = torch.randn(2, 3, i, dtype=torch.float64)
    torch.testing.assert_close(model(x), x @ (layer.weight + delta).T + layer.bias, rtol=1e-12, atol=1e-12)


def test_few_parameters_and_full_rank() -> None:
    model = net(24, 24, block_size=12)
    assert model.get_nb_trainable_parameters()[0] == 24 * 24 // 12
    assert torch.linalg.matrix_rank(c3a_at(model).delta_weight()) == 24


def test_gradients_of_the_fft_form() -> None:
    model = net()
    x = torch.randn(4, 15, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *_: model(x), (x, c3a_at(model).c3a_kernel))


@pytest.mark.parametrize(
    "start, deviation",
    [
        ("gaussian", 1.0),
        ("kaiming_uniform", 1 / math.sqrt(3 * 120)),
        ("xavier_uniform", math.sqrt(2 / (120 + 80))),
        (False, math.sqrt(2 / (120 + 80))),
    ],
)
def test_start_values(start: Any, deviation: float) -> None:
    kernel = c3a_at(net(120, 80, block_size=2, init_weights=start)).c3a_kernel
    assert abs(kernel.std().item() / deviation - 1) < 0.05


def test_it_may_start_at_the_base() -> None:
    model = net(init_weights=True)
    x = torch.randn(3, 15, dtype=torch.float64)
    with model.disable_adapter():
        base = model(x)
    assert torch.equal(model(x), base)
    randomise(model, 0.3)
    assert not torch.allclose(model(x), base)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"block_size": 0}, "block_size must be a positive integer; got 0"),
        ({"init_weights": "orthogonal"}, "'xavier_uniform'; got 'orthogonal'"),
        ({"bias": "some"}, "'c3a_only'; got 'some'"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        C3AConfig(**options)


def test_blocks_must_tile_the_layer() -> None:
    with pytest.raises(ConfigError, match="at 0 must divide 15 inputs and 10 outputs; got 3; try 5"):
        net(block_size=3)
    with pytest.raises(ConfigError, match="got 0; try 5"):
        net(block_size_pattern={"0": 0})
