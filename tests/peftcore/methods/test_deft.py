"""What the DEFT paper says: a subspace of the weight's outputs is projected out and refilled with learned content."""

from typing import Any

import pytest
import torch
from dropout_facts import assert_dropout_keeps_the_mean
from method_example import Example, randomise
from torch import nn

from peftcore import ConfigError, get_peft_model
from peftcore.methods.deft import DeftConfig

pytestmark = pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")

EXAMPLE = Example(
    DeftConfig,
    options={"r": 3},
    theirs="DeftConfig",
    parity={
        "plain": {"r": 4, "alpha": 6},
        "random": {"r": 4, "init_weights": False, "init_scale": 2.0},
        "orthogonal": {"r": 4, "decomposition_method": "qr"},
        "removal alone": {"r": 4, "para": True},
    },
    families=("gpt2", "llama", "bert"),
)


def adapted(spread: float = 0.5, **options: Any) -> tuple[Any, torch.Tensor, Any]:
    """(net, the base's weight, its adapter)."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 5).double()
    weight = layer.weight.detach().clone()
    net: Any = get_peft_model(nn.Sequential(layer), DeftConfig(**{"r": 3, **options}, target_modules=["0"]))
    randomise(net, spread)
    return net, weight, net[0].adapters["default"]


@pytest.mark.parametrize("method", ["relu", "qr"])
@pytest.mark.parametrize("alpha", [None, 6])
def test_the_papers_formula(method: str, alpha: int | None) -> None:
    net, weight, adapter = adapted(decomposition_method=method, alpha=alpha)
    p = adapter.deft_P
    q = p if method == "relu" else torch.linalg.qr(p).Q
    projector = p @ p.clamp(min=0).T if method == "relu" else q @ q.T
    expected = weight - projector @ weight + (2 if alpha else 1) * q @ adapter.deft_R
    torch.testing.assert_close(weight + adapter.delta_weight(), expected, rtol=1e-12, atol=1e-12)
    x = torch.randn(2, 6, dtype=torch.float64)
    torch.testing.assert_close(net(x), x @ expected.T + net[0].bias, rtol=1e-12, atol=1e-12)


def test_removal_alone_takes_rank_away_and_trains_the_directions_only() -> None:
    net, weight, adapter = adapted(decomposition_method="qr", para=True)
    assert [name for name, _ in adapter.named_parameters()] == ["deft_P"]
    changed = weight + adapter.delta_weight()
    assert torch.linalg.matrix_rank(changed) == 2
    assert (adapter.deft_P.T @ changed).abs().max() < 1e-12
    net.merge_adapter()
    torch.testing.assert_close(net[0].base_layer.weight, changed, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"alpha": 6}, {"decomposition_method": "qr"}])
def test_the_start_changes_nothing_although_a_subspace_is_removed(options: dict[str, Any]) -> None:
    _, weight, adapter = adapted(spread=0.0, **options)
    assert adapter.deft_P.abs().max() > 0.01
    assert adapter.delta_weight().abs().max() < 1e-15
    assert (adapter.deft_R.abs().max() > 1e-3) and weight.abs().max() > 0.1


def test_random_start_values_scale_with_init_scale() -> None:
    torch.manual_seed(0)
    config = DeftConfig(r=8, init_weights=False, init_scale=3.0, target_modules=["0"])
    net: Any = get_peft_model(nn.Sequential(nn.Linear(2000, 300)), config)
    adapter = net[0].adapters["default"]
    assert abs(adapter.deft_R.std() / 0.06 - 1) < 0.05 and abs(adapter.deft_P.std() / 0.02 - 1) < 0.05


def test_the_changes_of_two_adapters_add_up_in_any_order_of_merging() -> None:
    net, weight, first = adapted()
    net.add_adapter("other", DeftConfig(r=2, target_modules=["0"], init_weights=False))
    expected = weight + first.delta_weight() + net[0].adapters["other"].delta_weight()
    x = torch.randn(2, 6, dtype=torch.float64)
    net.set_adapter(["default", "other"])
    torch.testing.assert_close(net(x), x @ expected.T + net[0].bias, rtol=1e-12, atol=1e-12)
    net.merge_adapter(["other"])
    net.merge_adapter(["default"])
    torch.testing.assert_close(net[0].base_layer.weight, expected, rtol=1e-12, atol=1e-12)


def test_the_rank_is_at_most_the_number_of_outputs() -> None:
    _, _, adapter = adapted(r=8, alpha=10)
    assert adapter.deft_P.shape == (5, 5) and adapter.deft_R.shape == (5, 6) and adapter.deft_scaling == 2


def test_dropout_acts_on_what_is_filled_in_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 4, bias=False)).double()
    net = get_peft_model(net, DeftConfig(r=4, deft_dropout=0.4, target_modules=["0"], init_weights=False))
    assert_dropout_keeps_the_mean(net, torch.randn(1, 64, dtype=torch.float64))


def test_options_of_the_refill_warn_where_nothing_is_filled_in() -> None:
    with pytest.warns(UserWarning, match=r"alpha .* para=False"):
        adapted(para=True, alpha=4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"r": 0}, "r must be a positive integer; got 0"),
        ({"deft_dropout": 1.0}, "below 1; got 1.0"),
        ({"decomposition_method": "svd"}, "'relu', 'qr'; got 'svd'"),
        ({"bias": "some"}, "'deft_only'; got 'some'"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DeftConfig(**options)
