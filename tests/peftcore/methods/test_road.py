"""What the RoAd paper says, and what RoAd must refuse."""

import math

import pytest
import torch
from method_example import Example, randomise
from torch import nn

from peftcore import ConfigError, get_peft_model
from peftcore.methods.road import RoadConfig

EXAMPLE = Example(
    RoadConfig,
    options={"group_size": 4},
    layers={"Conv2d": {"variant": "road_2"}, "Embedding": {"variant": "road_4"}, "Conv1D": {"variant": "road_4"}},
    theirs="RoadConfig",
    parity={
        "road_1": {"group_size": 8},
        "road_2": {"group_size": 16, "variant": "road_2"},
        "road_4": {"group_size": 8, "variant": "road_4"},
    },
    families=("llama", "bert", "t5"),
)


def matrix(variant: str, theta: list[float], alpha: list[float]) -> torch.Tensor:
    """R of a layer with two outputs, read off from an identity as base."""
    net = nn.Sequential(nn.Linear(2, 2, bias=False)).double()
    nn.init.eye_(net[0].weight)
    net = get_peft_model(net, RoadConfig(variant=variant, group_size=2, target_modules=["0"]))
    adapter = net[0].adapters["default"]
    with torch.no_grad():
        adapter.road_theta.copy_(torch.tensor(theta))
        adapter.road_alpha.copy_(torch.tensor(alpha))
    return net(torch.eye(2, dtype=torch.float64)).T.detach()


def test_equation_of_each_variant() -> None:
    sin, cos = math.sin, math.cos
    cases = {
        "road_1": ([0.3], [2.0], [[2 * cos(0.3), -2 * sin(0.3)], [2 * sin(0.3), 2 * cos(0.3)]]),
        "road_2": ([0.3, 0.5], [2.0, 3.0], [[2 * cos(0.3), -2 * sin(0.3)], [3 * sin(0.5), 3 * cos(0.5)]]),
        "road_4": (
            [0.3, 0.5, 0.7, 0.9],
            [2.0, 3.0, 4.0, 5.0],
            [[2 * cos(0.3), -4 * sin(0.7)], [5 * sin(0.9), 3 * cos(0.5)]],
        ),
    }
    for variant, (theta, alpha, expected) in cases.items():
        wanted = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(matrix(variant, theta, alpha), wanted, rtol=1e-7, atol=1e-7)


def test_angles_alone_keep_every_length() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8)).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    before = net(x)
    net = get_peft_model(net, RoadConfig(group_size=8, target_modules=["0"]))
    nn.init.normal_(net[0].adapters["default"].road_theta)
    after = net(x)
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1), rtol=1e-12, atol=1e-12)


def test_pairs_stay_within_their_group() -> None:
    net = nn.Sequential(nn.Linear(8, 8, bias=False)).double()
    nn.init.eye_(net[0].weight)
    net = get_peft_model(net, RoadConfig(group_size=4, target_modules=["0"]))
    randomise(net, 0.3)
    moved = net(torch.eye(8, dtype=torch.float64)).T.detach() != 0
    partner = [2, 3, 0, 1, 6, 7, 4, 5]
    assert all(set(row.nonzero().flatten().tolist()) == {n, partner[n]} for n, row in enumerate(moved))


def test_parameters_are_as_many_as_the_variant_says() -> None:
    for variant, each in {"road_1": 1, "road_2": 2, "road_4": 4}.items():
        config = RoadConfig(variant=variant, group_size=8, target_modules=["0"])
        net = get_peft_model(nn.Sequential(nn.Linear(6, 16)), config)
        assert net.get_nb_trainable_parameters()[0] == 16 * each


def test_random_start_is_for_tests() -> None:
    config = RoadConfig(group_size=8, target_modules=["0"], init_weights=False)
    adapter = get_peft_model(nn.Sequential(nn.Linear(6, 8000)), config)[0].adapters["default"]
    assert abs(adapter.road_theta.std() - 0.5) < 0.02 and abs(adapter.road_alpha.mean() - 1) < 0.03


@pytest.mark.parametrize(
    "options, message",
    [
        ({"variant": "road_3"}, "one of 'road_1', 'road_2', 'road_4'; got 'road_3'"),
        ({"group_size": 3}, "must be even, got 3; try 4"),
        ({"group_size": 0}, "group_size must be a positive integer; got 0"),
    ],
)
def test_impossible_options(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RoadConfig(**options)


def test_a_group_must_fit_the_layer() -> None:
    with pytest.raises(ConfigError, match="must divide the 10 outputs of 0, got 64"):
        get_peft_model(nn.Sequential(nn.Linear(6, 10)), RoadConfig(target_modules=["0"]))
