"""r, lora_alpha and lora_dropout of params.yaml reach every method that has them, and are refused by line elsewhere."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from params_texts import read, refusal

from flows.params import Params
from flows.params.method_fields import ALTERNATIVES, FIELDS, SHARED
from flows.training.adapter_choice import adapter_config
from peftcore.registry import method_named, tuner_names

GIVEN: dict[str, Any] = {"r": 6, "lora_alpha": 24.0, "lora_dropout": 0.125}
NEEDED: dict[str, dict[str, Any]] = {
    "trainable_tokens": {"token_indices": [1]},
    "xlora": {"hidden_size": 8, "adapters": {"1": "there"}},
}
"""{method: options without which it has no configuration}"""
METHODS = [name.lower() for name in tuner_names()]


def method(name: str, **options: Any) -> Params:
    return Params.model_validate({"method": {"name": name, "options": NEEDED.get(name, {}), **options}})


@pytest.mark.parametrize("name", METHODS)
def test_an_option_reaches_the_methods_own_field(name: str) -> None:
    taken = FIELDS.get(name, {})
    config = adapter_config(method(name, **{option: GIVEN[option] for option in taken}), 100)
    for option, field in taken.items():
        assert getattr(config, field) == GIVEN[option]


@pytest.mark.parametrize("name", METHODS)
def test_null_is_the_methods_own_default(name: str) -> None:
    config = adapter_config(method(name, **dict.fromkeys(SHARED)), 100)
    default = method_named(name.upper()).config(**NEEDED.get(name, {}))
    for field in {"r", "alpha", "lora_alpha", *FIELDS.get(name, {}).values()}:
        assert getattr(config, field, None) == getattr(default, field, None)


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


def test_lora_has_the_pipelines_defaults() -> None:
    lora: Any = adapter_config(Params(), 100)
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (16, 32, 0.0)


def test_a_schedule_is_shares_of_the_run_or_an_option() -> None:
    schedule = {"warmup_share": 0.25, "final_share": 0.5}
    config: Any = adapter_config(method("adalora", schedule=schedule, options={"tfinal": 7, "init_r": 24}), 100)
    assert (config.total_step, config.tinit, config.tfinal, config.init_r) == (100, 25, 7, 24)
