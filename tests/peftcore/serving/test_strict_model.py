"""Models of requests take nothing that they do not know."""

import pytest
from pydantic import ValidationError

from peftcore.serving.strict_model import StrictModel


class Point(StrictModel):
    x: int


def test_unknown_fields_and_other_types_are_refused() -> None:
    assert Point.model_validate({"x": 2}).x == 2
    for given in ({"x": "2"}, {"x": True}, {"x": 2, "y": 3}):
        with pytest.raises(ValidationError):
            Point.model_validate(given)
