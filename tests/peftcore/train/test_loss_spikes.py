import random
import re

import pytest

from peftcore.train import FaultPolicy
from peftcore.train.loss_spikes import LEAST_DEVIATION, LossSpikeDetector


def watch(*losses: float, window: int = 20, deviations: float | None = 10.0) -> LossSpikeDetector:
    made = LossSpikeDetector(FaultPolicy(spike_window=window, spike_deviations=deviations))
    assert [made.fault(loss) for loss in losses] == [None] * len(losses)
    return made


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_is_wrong_from_the_first_step(loss: float) -> None:
    assert watch(deviations=None).fault(loss) == f"the loss is {loss}"


def test_a_spike_is_a_number_of_standard_deviations_above_the_median() -> None:
    generator = random.Random(0)
    losses = [generator.gauss(5, 0.4) for _ in range(400)]
    seen = watch(*losses, window=400)
    assert seen.fault(5 + 9 * 0.4) is None
    assert re.fullmatch(r"the loss is 9\.4, a spike above the [45]\.\d* of the last 400", str(seen.fault(5 + 11 * 0.4)))


def test_steps_that_are_nearly_alike_do_not_make_a_spike_of_a_small_rise() -> None:
    assert watch(*[0.01] * 20).fault(0.01 + 9.9 * LEAST_DEVIATION) is None
    assert watch(*[0.01] * 20).fault(0.01 + 10.1 * LEAST_DEVIATION)


def test_a_falling_loss_is_no_spike_and_neither_is_a_slow_rise() -> None:
    watch(*[11 - step / 10 for step in range(100)], *[1 + step / 10 for step in range(100)])


def test_a_spike_is_not_remembered() -> None:
    seen = watch(*[2.0] * 20)
    assert all(seen.fault(50.0) for _ in range(100))
    assert list(seen.losses) == [2.0] * 20


def test_the_first_losses_are_not_judged_by_too_few() -> None:
    assert watch(*[1.0] * 9, window=20).fault(100.0) is None
    assert watch(*[1.0] * 10, window=20).fault(100.0)
    assert watch(*[1.0] * 20, deviations=None).fault(100.0) is None
