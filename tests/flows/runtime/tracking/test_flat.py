"""Nested results as flat names."""

from flows.runtime.tracking.flat import flat, numbers


def test_nested_names_are_joined_and_nothing_is_left_out_but_none() -> None:
    values = {"a": {"b": {"c": 1}, "d": None, "e": {}}, "f": [1, {"g": 2}], "h": False}
    assert flat(values) == {"a.b.c": 1, "f": [1, {"g": 2}], "h": False}
    assert flat(values, separator="/")["a/b/c"] == 1


def test_only_finite_numbers_are_numbers() -> None:
    values = {"a": 1, "b": 2.5, "c": True, "d": "3", "e": float("nan"), "f": float("inf"), "g": [1]}
    assert numbers(values) == {"a": 1.0, "b": 2.5}
