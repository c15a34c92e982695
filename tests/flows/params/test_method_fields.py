"""r, lora_alpha and lora_dropout of params.yaml: read for each method that has them, else refused by line."""

import dataclasses
from pathlib import Path

import pytest
from method_cases import GIVEN, METHODS

from flows.errors import ParamsError
from flows.params import Params, load_params
from flows.params.method_fields import ALTERNATIVES, FIELDS, SHARED
from peftcore.registry import method_named


def read(folder: Path, text: str) -> Params:
    (folder / "params.yaml").write_text(text)
    return load_params(folder / "params.yaml")


@pytest.mark.parametrize("name", METHODS)
def test_an_option_that_a_method_has_not_is_refused_by_line(name: str, tmp_path: Path) -> None:
    lines = [f"  {option}: {GIVEN[option]}" for option in SHARED]
    missing = [option for option in SHARED if option not in FIELDS.get(name, {})]
    text = "\n".join(["method:", f"  name: {name}", *lines])
    if not missing:
        read(tmp_path, text)
        return
    with pytest.raises(ParamsError) as refused:
        read(tmp_path, text)
    said = str(refused.value).splitlines()
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{name: ia3, use_rslora: true}", "method.use_rslora: true does not fit; ia3 has no such option; give false"),
        ("{name: loha, r: 8, options: {r: 4}}", "method.options.r: 4 does not fit; method.r is 8, which is the same"),
        (
            "{name: vera, r: auto}",
            "method.r: 'auto' does not fit; ranks are searched for lora only; give vera a number",
        ),
        ("{name: ia3, r: auto}", "method.r: 'auto' does not fit; ranks are searched for lora only; give ia3 null"),
        ("{name: [lora], r: 8}", "method.name"),
    ],
)
def test_what_does_not_go_together_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ParamsError) as refused:
        read(tmp_path, f"method: {text}")
    assert message in str(refused.value)


@pytest.mark.parametrize("given", ["{r: atuo}", "{r: 0}", "{r: true}", "{r: 2.5}", "{name: adalora, r: auto}"])
def test_what_is_no_rank_is_refused(given: str, tmp_path: Path) -> None:
    with pytest.raises(
        ParamsError, match=r"method\.r: .* does not fit; (give a whole number of at least 1, or auto|rank)"
    ):
        read(tmp_path, f"method: {given}")
