"""KTO's losses: the papers' formulas in float64, their gradients, and the recommended weights."""

import math
from typing import Any

import pytest
import torch

from peftcore import ConfigError
from peftcore.train import Kto, kto_reference_point, kto_weight_range

RATIOS, DESIRABLE = [1.5, -0.5, 0.2, -2.0], [True, True, False, False]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def tensors(requires_grad: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(RATIOS, dtype=torch.float64, requires_grad=requires_grad), torch.tensor(DESIRABLE)


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_losses_are_the_papers_formulas(loss: Any) -> None:
    point = 0.7
    kto = Kto(beta=0.4, loss=loss, desirable_weight=1.3, undesirable_weight=0.6)
    losses = kto.losses(*tensors(), torch.tensor(point, dtype=torch.float64))
    z = point if loss == "kto" else 0.0
    expected = [
        1.3 * (1 - sigmoid(0.4 * (r - z))) if wanted else 0.6 * (1 - sigmoid(0.4 * (z - r)))
        for r, wanted in zip(RATIOS, DESIRABLE, strict=True)
    ]
    assert losses.tolist() == pytest.approx(expected, rel=1e-12)


def test_gradients_vanish_for_answers_far_from_the_reference_point() -> None:
    ratios, desirable = tensors(requires_grad=True)
    point = torch.tensor(0.7, dtype=torch.float64)
    Kto(beta=0.4).losses(ratios, desirable, point).sum().backward()
    slopes = [0.4 * sigmoid(0.4 * (r - 0.7)) * sigmoid(-0.4 * (r - 0.7)) for r in RATIOS]
    expected = [-slope if wanted else slope for slope, wanted in zip(slopes, DESIRABLE, strict=True)]
    assert ratios.grad is not None and ratios.grad.tolist() == pytest.approx(expected, rel=1e-12)


def test_a_model_that_is_its_reference_has_a_loss_of_one_half() -> None:
    losses = Kto().losses(torch.zeros(4), torch.tensor(DESIRABLE), torch.tensor(0.0))
    assert losses.tolist() == [0.5] * 4


def test_the_reference_point_is_a_mean_of_at_least_zero_without_a_gradient() -> None:
    assert kto_reference_point(torch.tensor([1.0, 2.5])).item() == 1.75
    assert kto_reference_point(torch.tensor([1.0, -2.5])).item() == 0.0
    assert kto_reference_point(torch.zeros(0)).item() == 0.0
    assert not kto_reference_point(torch.ones(2, requires_grad=True)).requires_grad


def test_recommended_weights_are_those_of_equation_8() -> None:
    low, high = kto_weight_range(desirable=30, undesirable=90, other_weight=0.5)
    assert low * 30 / (0.5 * 90) == pytest.approx(1) and high * 30 / (0.5 * 90) == pytest.approx(4 / 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta must be above 0; got 0.0"),
        ({"beta": math.nan}, "beta must be above 0; got nan"),
        ({"loss": "bco"}, "loss must be one of kto, apo_zero_unpaired; got 'bco'"),
        ({"desirable_weight": -1.0}, "desirable_weight must be at least 0; got -1.0"),
        ({"desirable_weight": 0.0, "undesirable_weight": 0.0}, "both 0"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Kto(**options)
