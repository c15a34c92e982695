"""What tests of training have in common: a tiny Llama, quiet arguments, and what is asked of a trainer afterwards."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

VOCABULARY = 50


def tiny_llama() -> LlamaForCausalLM:
    """Two blocks of width 32, always the same."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def quiet(folder: Path, **options: Any) -> dict[str, Any]:
    """Options of TrainingArguments: on the CPU, every step logged, nothing saved, shown or reported."""
    common: dict[str, Any] = {
        "output_dir": str(folder),
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "log_level": "error",
    }
    return common | options


def quiet_arguments(folder: Path, **options: Any) -> TrainingArguments:
    """TrainingArguments of `quiet`."""
    return TrainingArguments(**quiet(folder, **options))


def without_printing(made: Any) -> Any:
    """The trainer, without the callback that prints records where there are no bars."""
    made.callback_handler.callbacks = [
        callback for callback in made.callback_handler.callbacks if type(callback).__name__ != "PrinterCallback"
    ]
    return made


def trained(model: Any) -> dict[str, Tensor]:
    """Copies of the trained parameters by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """The same names, and the same bits."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def losses(made: Any) -> list[float]:
    """Of a run's training records."""
    return [record["loss"] for record in made.state.log_history if "loss" in record]


class Stop(Exception):
    """What DieAt ends a run with."""


class DieAt(TrainerCallback):
    """Ends a run without any tidying, after the step's checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Stop
