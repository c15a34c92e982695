"""`peftcore chat` with lines that are piped in."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from flows.cli import app
from peftcore import LoraConfig, get_peft_model


@pytest.fixture
def adapter(tiny_base: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tiny_base.with_name("poet"))
    return tiny_base.with_name("poet")


def chat(*arguments: str, lines: str = "") -> Any:
    return CliRunner().invoke(app, ["chat", *arguments], input=lines)


def test_an_adapter_and_its_base_answer_side_by_side(adapter: Path, tiny_base: Path) -> None:
    given = ("--adapter", str(adapter), "--base", str(tiny_base), "--max-tokens", "3")
    done = chat("base", "poet", *given, lines="Hello?\n/models\n")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.count("tokens, ") == 2 and "--- poet" in done.stdout and done.stdout.rstrip().endswith("poet")


def test_what_cannot_be_done_is_said(adapter: Path, tiny_base: Path) -> None:
    assert "give --base too" in chat("--adapter", str(adapter)).stderr
    assert "side by side" in chat("a", "b", "c").stderr
    given = ("--adapter", str(adapter), "--base", str(tiny_base))
    refused = chat("champion", *given)
    assert refused.exit_code == 1 and "there is no model champion; there is: base, poet" in refused.stderr
