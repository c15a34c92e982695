"""X-LoRA options: the order of the classes, and values that are refused."""

import json
from pathlib import Path

import pytest

from peftcore import ConfigError
from peftcore.methods.xlora import XLoraConfig


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hidden_size": None}, "hidden_size is needed"),
        ({"adapters": {}}, "adapters is needed"),
        ({"xlora_depth": 0}, "xlora_depth must be a positive integer; got 0"),
        ({"xlora_dropout_p": 1.0}, "below 1; got 1.0"),
        ({"softmax_temperature": 0}, "above 0; got 0"),
        ({"top_k_lora": 2}, "top_k_lora must be 1 to 1; got 2"),
    ],
)
def test_impossible_options(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        XLoraConfig(**{"hidden_size": 32, "adapters": {"0": "somewhere"}, **options})


def test_two_softmaxes_warn() -> None:
    with pytest.warns(UserWarning, match="softmax over a softmax"):
        XLoraConfig(hidden_size=8, adapters={"0": "x"}, top_k_lora=1, enable_softmax_topk=True)


def test_classes_are_in_the_order_of_their_numbers_or_else_of_their_names(tmp_path: Path) -> None:
    def directories(*names: str) -> list[str]:
        for name in names:
            (tmp_path / name).mkdir(exist_ok=True)
        adapters = {name: str(tmp_path / name) for name in names}
        return [d.name for d in XLoraConfig(hidden_size=8, adapters=adapters).directories()]

    assert directories("10", "9", "11") == ["9", "10", "11"]
    assert directories("b", "10", "9") == ["10", "9", "b"]


def test_options_survive_a_round_trip_through_json() -> None:
    config = XLoraConfig(hidden_size=8, adapters={"0": "x", "1": "y"}, top_k_lora=1, enable_softmax=False)
    again = XLoraConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert "target_modules" not in config.to_dict()  # PEFT's own class has no such field
