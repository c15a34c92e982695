"""How long a run is, and what names it."""

import pytest

from flows.params import Params, Train
from flows.training.run import optimizer_steps


@pytest.mark.parametrize(
    ("rows", "batch", "accumulation", "epochs", "steps"),
    [(1600, 8, 2, 1.0, 100), (17, 4, 2, 1.0, 3), (17, 4, 2, 1.5, 5), (3, 8, 4, 2.0, 2)],
)
def test_steps_are_counted_as_the_trainer_does(
    rows: int, batch: int, accumulation: int, epochs: float, steps: int
) -> None:
    train = Train(batch_size=batch, gradient_accumulation=accumulation, epochs=epochs)
    assert optimizer_steps(Params(train=train), range(rows)) == steps
