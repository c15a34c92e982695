"""Prompt tuning: learned embeddings before the text."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from prompt_models import FAMILIES, both_ways

from peftcore.errors import ConfigError
from peftcore.prompts.prompt_tuning import PromptTuningConfig


@pytest.mark.filterwarnings("ignore")  # the oracle's own
@pytest.mark.parametrize("family", FAMILIES)
def test_parity(family: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_virtual_tokens": 3, "task_type": FAMILIES[family][1]}
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0  # right-padded, where both libraries put the prompt in front
    if family == "llama-cls":  # PEFT reads the padding's answer there
        mask[:] = 1
    both_ways(family, peft.PromptTuningConfig(**options), PromptTuningConfig(**options), tmp_path, attention_mask=mask)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens must be a positive integer"),
        ({"num_virtual_tokens": 2, "prompt_tuning_init": "WORDS"}, "must be one of"),
        ({"num_virtual_tokens": 2, "prompt_tuning_init": "TEXT"}, "needs tokenizer_name_or_path"),
        (
            {"num_virtual_tokens": 2, "prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "x"},
            "needs prompt_tuning_init_text",
        ),
        ({"num_virtual_tokens": 2, "tokenizer_kwargs": {"use_fast": True}}, "tokenizer_kwargs are for"),
    ],
)
def test_configurations_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PromptTuningConfig(**options)
