"""Limits of a server are above 0."""

from typing import Any

import pytest

from peftcore import ConfigError
from peftcore.serving import Limits


@pytest.mark.parametrize("option", [{"max_batch": 0}, {"max_context": -1}, {"timeout": 0.0}])
def test_a_limit_that_is_not_positive_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(option))} must be above 0"):
        Limits(**option)
