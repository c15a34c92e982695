"""Values of a fault policy that are out of range are refused."""

import pytest

from peftcore import ConfigError
from peftcore.train import FaultPolicy


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"on_out_of_memory": "hope"}, "must be split or stop; got 'hope'"),
        ({"on_bad_loss": "ignore"}, "must be stop or rollback"),
        ({"spike_deviations": 0.0}, "positive or None"),
        ({"spike_window": 2}, "at least 4 steps"),
        ({"max_rollbacks": 0}, "at least 1"),
    ],
)
def test_a_policy_that_cannot_be_is_refused(given: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        FaultPolicy(**given)
