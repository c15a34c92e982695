"""Sections are strict and frozen; the types of their values, at their bounds."""

import math
import re
from typing import Any, ClassVar

import pytest
from pydantic import TypeAdapter, ValidationError

from flows.params import section
from flows.params.section import HUB, Section, invalid_value


class Kitchen(Section):
    renamed: ClassVar = {"heat": "kitchen.degrees"}

    degrees: section.Positive = 180.0
    trays: section.Count = 2
    fan: bool = False


@pytest.mark.parametrize("values", [{"oven": 1}, {"heat": 1.0}, {"trays": "8"}, {"trays": True}, {"trays": 2.0}])
def test_unknown_keys_and_other_types_are_errors(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Kitchen.model_validate(values)


@pytest.mark.parametrize("values", [{"degrees": "180"}, {"degrees": True}, {"fan": 1}, {"fan": "yes"}])
def test_text_is_no_number_and_a_number_no_truth_value(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Kitchen.model_validate(values)


def test_python_s_none_is_refused_where_null_fits() -> None:
    class Oven(Section):
        trays: section.Count | None = None
        note: str | None = None
        name: str = "oven"

    for key in ("trays", "note"):
        with pytest.raises(ValidationError, match="None is a text in YAML; write null"):
            Oven.model_validate({key: "None"})
    assert Oven.model_validate({"name": "None", "note": None, "trays": None}).name == "None"


def test_an_integer_does_for_a_float() -> None:
    assert Kitchen.model_validate({"degrees": 200}).degrees == 200.0


def test_a_section_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Kitchen().trays = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("name", "fit", "refused"),
    [
        ("Share", [0.0, 0.999], [1.0, -0.001, math.nan]),
        ("Probability", [0.0, 1.0], [1.001, -0.001, math.nan]),
        ("Confidence", [0.001, 0.999], [0.0, 1.0, math.nan]),
        ("Count", [1], [0, 1.5]),
        ("Whole", [0], [-1]),
        ("Positive", [1e-9], [0.0, math.inf, math.nan]),
        ("NonNegative", [0.0], [-1e-9, math.inf, math.nan]),
        ("Finite", [-1e9], [math.inf, -math.inf, math.nan]),
        ("Text", ["a"], [""]),
        ("Name", ["a", "a1", "a-b"], ["", "A", "1a", "-a", "a-", "a b", "a#b", "a@b", "a\n"]),
    ],
)
def test_each_type_ends_where_its_name_says(name: str, fit: list[Any], refused: list[Any]) -> None:
    adapter = TypeAdapter(getattr(section, name))
    assert [adapter.validate_python(value) for value in fit] == fit
    for value in refused:
        with pytest.raises(ValidationError):
            adapter.validate_python(value)


@pytest.mark.parametrize(
    ("source", "fits"),
    [
        ("hub:a/b", True),
        ("hub:a/b@v1.0", True),
        ("hub:gpt2", True),
        ("hub:-x/b", False),
        ("hub:a/b@--force", False),
        ("hub:a b", False),
        ("hub:", False),
    ],
)
def test_a_repository_of_the_hub_does_not_begin_like_an_option(source: str, fits: bool) -> None:
    assert bool(re.fullmatch(HUB, source)) is fits


def test_an_error_of_a_whole_section_names_the_key_and_its_value() -> None:
    error = invalid_value("give less than {all}", "trays", 9)
    assert error.type == "invalid_value"
    assert error.message() == "give less than {all}", "a brace of the text is text"
    assert error.context == {"expected": "give less than {all}", "key": "trays", "value": 9}
