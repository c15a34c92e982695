"""Configurations on disk: what is damaged, unknown or foreign."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from peftcore import CheckpointError, ConfigError, LoraConfig, PeftConfig
from peftcore.config import TunerConfig


def test_unknown_method_names_those_there_are() -> None:
    with pytest.raises(ConfigError, match="did you mean 'LORA'"):
        PeftConfig.from_dict({"peft_type": "LORRA"})
    with pytest.raises(ConfigError, match="without peft_type"):
        PeftConfig.from_dict({"r": 8})


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json"):
        PeftConfig.from_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"r": 8')
    with pytest.raises(CheckpointError, match="not valid JSON"):
        PeftConfig.from_pretrained(tmp_path)


def test_disk_form_is_sorted_and_names_the_method(tmp_path: Path) -> None:
    LoraConfig(target_modules=["v", "q"]).save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    values = json.loads(text)
    assert values["peft_type"] == "LORA" and values["target_modules"] == ["q", "v"]
    assert list(values) == sorted(values)


def test_types_that_cannot_be_looked_at_are_not_asked() -> None:
    """A package that postpones its annotations has strings for types."""

    @dataclass
    class AnyConfig(TunerConfig):
        whatever: Any = None
        postponed: "int" = 3
        strange_pattern: "dict[str, int] | None" = None

    made = AnyConfig(whatever=object(), postponed="3", strange_pattern={"a": 2})  # pyright: ignore
    assert made.strange_pattern == {"a": 2}
    with pytest.raises(ConfigError, match="not a regular expression"):
        AnyConfig(strange_pattern={"(": 2})
