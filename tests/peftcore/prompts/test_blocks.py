"""The blocks that a configuration names."""

from typing import Any

import pytest

from peftcore import LoReftConfig
from peftcore.errors import TargetError
from peftcore.prompts.blocks import chosen_blocks

PATHS = [f"model.layers.{number}" for number in range(4)]


@pytest.mark.parametrize(
    "options, numbers",
    [
        ({}, [0, 1, 2, 3]),
        ({"target_modules": ["layers.1", "layers.3"]}, [1, 3]),
        ({"target_modules": r".*\.[02]"}, [0, 2]),
        ({"exclude_modules": ["layers.0"]}, [1, 2, 3]),
        ({"exclude_modules": r".*\.[01]"}, [2, 3]),
        ({"layers_to_transform": 2}, [2]),
        ({"layers_to_transform": [0, 3], "layers_pattern": ["layers"], "exclude_modules": ["layers.3"]}, [0]),
    ],
)
def test_options_select_blocks(options: dict[str, Any], numbers: list[int]) -> None:
    assert chosen_blocks(LoReftConfig(**options), PATHS) == numbers


@pytest.mark.parametrize(
    "options",
    [{"target_modules": ["q_proj"]}, {"layers_to_transform": [9]}, {"layers_to_transform": 0, "layers_pattern": ["h"]}],
)
def test_no_block_is_an_error(options: dict[str, Any]) -> None:
    message = r"LOREFT adapts whole blocks, and the options name none of model\.layers\.0 to model\.layers\.3"
    with pytest.raises(TargetError, match=message):
        chosen_blocks(LoReftConfig(**options), PATHS)
