"""r, lora_alpha and lora_dropout of params.yaml: read for each method that has them, else refused by line."""

import dataclasses
from pathlib import Path

import pytest
from method_cases import GIVEN, METHODS
from params_texts import read, refusal

from flows.params.method_fields import ALTERNATIVES, FIELDS, SHARED
from peftcore.registry import method_named


@pytest.mark.parametrize("name", METHODS)
def test_an_option_that_a_method_has_not_is_refused_by_line(name: str, tmp_path: Path) -> None:
    lines = [f"  {option}: {GIVEN[option]}" for option in SHARED]
    missing = [option for option in SHARED if option not in FIELDS.get(name, {})]
    text = "\n".join(["method:", f"  name: {name}", *lines])
    if not missing:
        read(tmp_path, text)
        return
    said = refusal(tmp_path, text).splitlines()
    assert len(said) == len(missing)
    for line, option in zip(said, missing, strict=True):
        assert line.startswith(f"params.yaml:{SHARED.index(option) + 3}: method.{option}: ")
        assert f"{name} has no such option; give null" in line
        assert ALTERNATIVES.get(name, {}).get(option, "") in line


@pytest.mark.parametrize("name", METHODS)
def test_what_a_file_may_say_of_every_method(name: str, tmp_path: Path) -> None:
    read(tmp_path, f"method: {{name: {name}, r: null, lora_alpha: null, lora_dropout: 0.0, use_rslora: false}}")
    read(tmp_path, f"method: {{name: {name}}}")


def test_the_tables_speak_of_methods_and_fields_that_there_are() -> None:
    for name, fields in FIELDS.items():
        known = {field.name for field in dataclasses.fields(method_named(name.upper()).config)}
        assert fields.keys() <= set(SHARED) and set(fields.values()) <= known
    for name, others in ALTERNATIVES.items():
        assert name in METHODS and not others.keys() & FIELDS.get(name, {}).keys()
        known = {field.name for field in dataclasses.fields(method_named(name.upper()).config)}
        own = [word.removeprefix("options.").strip(",") for text in others.values() for word in text.split()]
        assert {word for word in own if "_" in word and "." not in word} <= known
