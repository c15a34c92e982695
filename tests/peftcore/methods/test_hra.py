"""What the HRA paper says: a chain of Householder reflections is orthogonal and of low rank away from the identity."""

from typing import Any

import pytest
import torch
from layer_parity import agrees_with_peft
from method_example import Example, randomise
from torch import nn

from peftcore import ConfigError, get_peft_model
from peftcore.injection.adapter_set import adapter_set
from peftcore.methods.hra import HRAConfig

EXAMPLE = Example(
    HRAConfig,
    options={"r": 4},
    theirs="HRAConfig",
    parity={
        "even": {"r": 4},
        "odd": {"r": 3, "bias": "hra_only"},
        "orthogonalised": {"r": 4, "apply_GS": True},
    },
    targets={"gpt2": ["lm_head"], "bert": ["query", "intermediate.dense", "classifier"]},  # PEFT's HRA knows no Conv1D
)


def adapted(layer: nn.Module, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    net = get_peft_model(nn.Sequential(layer).double(), HRAConfig(target_modules=["0"], **options))
    randomise(net, 0.5)
    return net, adapter_set(net).adapters("default")["0"]


def matrix(a: Any) -> torch.Tensor:
    left, u = a.factors()
    return (torch.eye(len(u), dtype=u.dtype) - left @ u.T).detach()


@pytest.mark.parametrize("r", [2, 6])
def test_the_papers_formula(r: int) -> None:
    layer, x = nn.Linear(12, 9).double(), torch.randn(4, 12, dtype=torch.float64)
    weight, bias = layer.weight.clone(), layer.bias.clone()
    net, a = adapted(layer, r=r)
    chain = torch.eye(12, dtype=torch.float64)
    for u in (a.hra_u / a.hra_u.norm(dim=0)).T:
        chain = chain @ (torch.eye(12, dtype=torch.float64) - 2 * torch.outer(u, u))
    torch.testing.assert_close(matrix(a), chain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(net(x), x @ (weight @ chain).T + bias, rtol=1e-12, atol=1e-12)


def test_gram_schmidt_reflects_in_the_span_of_the_directions() -> None:
    layer = nn.Linear(12, 9)
    _, a = adapted(layer, r=4, apply_GS=True)
    u = a.hra_u.detach()
    torch.testing.assert_close(matrix(a), torch.eye(12, dtype=torch.float64) - 2 * u @ torch.linalg.pinv(u))


@pytest.mark.parametrize("gram_schmidt", [False, True])
def test_orthogonal_with_a_change_of_low_rank(gram_schmidt: bool) -> None:
    _, a = adapted(nn.Linear(12, 9), r=4, apply_GS=gram_schmidt)
    h = matrix(a)
    torch.testing.assert_close(h @ h.T, torch.eye(12, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert torch.linalg.matrix_rank(h - torch.eye(12)) == 4
    torch.testing.assert_close(torch.linalg.det(h), torch.tensor(1.0, dtype=torch.float64))


def test_start_values() -> None:
    _, a = adapted(nn.Linear(12, 9), r=4)
    a.reset_parameters()
    assert torch.equal(a.hra_u[:, ::2], a.hra_u[:, 1::2]) and not torch.equal(a.hra_u[:, 0], a.hra_u[:, 2])
    for options in ({"init_weights": False}, {"apply_GS": True}):
        _, a = adapted(nn.Linear(12, 9), r=4, **options)
        a.reset_parameters()
        assert torch.linalg.matrix_rank(a.hra_u) == 4 and matrix(a).isfinite().all()
    with pytest.warns(
        UserWarning, match="^The symmetric initialization can NOT be performed when r is odd: .* got r=3, try 4"
    ):
        adapted(nn.Linear(12, 9), r=3)


@pytest.mark.parametrize("gram_schmidt", [False, True])
def test_gradients_are_right(gram_schmidt: bool) -> None:
    net, a = adapted(nn.Linear(8, 5), r=4, apply_GS=gram_schmidt)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *_: net(x), (x, a.hra_u))


@pytest.mark.parametrize("gram_schmidt", [False, True])
def test_convolutions(gram_schmidt: bool, tmp_path: Any) -> None:
    x, options = torch.randn(2, 6, 7, 7), {"r": 4, "apply_GS": gram_schmidt}
    for number, layer in enumerate((nn.Conv2d(6, 8, 3, padding=1, stride=2), nn.Conv2d(6, 8, 1))):
        agrees_with_peft(layer, x, "HRAConfig", HRAConfig, options, tmp_path / str(number))


def test_autocast_leaves_the_reflections_exact() -> None:
    net, a = adapted(nn.Linear(12, 9), r=4)
    net.float()
    with torch.autocast("cpu", torch.bfloat16):
        left, u = a.factors()
    h = torch.eye(12) - left @ u.T
    torch.testing.assert_close(h @ h.T, torch.eye(12), rtol=0, atol=1e-6)


def test_impossible_options() -> None:
    for options, message in (({"r": 0}, "positive integer; got 0"), ({"bias": "some"}, "'hra_only'; got 'some'")):
        with pytest.raises(ConfigError, match=message):
            HRAConfig(**options)
    with pytest.raises(ConfigError, match="r up to the 6 features of 0, got 8; try 6"):
        get_peft_model(nn.Sequential(nn.Linear(6, 5)), HRAConfig(apply_GS=True, target_modules=["0"]))
