"""TRL's SFTTrainer and DPOTrainer on tiny adapted models."""

import warnings
from functools import cache
from pathlib import Path
from typing import Any

from datasets import Dataset
from quiet_training import quiet, without_printing
from tiny_training import adapted
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer

from peftcore.train import AdapterTrainerMixin

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own imports
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

PROMPTS = ["a b c", "a b", "c a", "b"]
ANSWERS = [" d e", " f g h", " b", " a e f"]


class AdapterSFTTrainer(AdapterTrainerMixin, SFTTrainer):
    """The mixin over TRL's trainer."""


class AdapterDPOTrainer(AdapterTrainerMixin, DPOTrainer):
    """The mixin over TRL's trainer of pairs."""


@cache
def tokenizer() -> Any:
    words = {"<pad>": 0, "<eos>": 1, **{letter: number for number, letter in enumerate("abcdefgh", 2)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>")


def options(folder: Path, **own: Any) -> dict[str, Any]:
    trls = {"max_steps": 3, "per_device_train_batch_size": 2, "bf16": False, "gradient_checkpointing": False}
    return quiet(folder, **(trls | own))


def sft(model: Any, folder: Path, made_by: type[Trainer] = SFTTrainer, peft_config: Any = None, **own: Any) -> Any:
    """A trainer on answers to prompts, whose own tokens are masked."""
    rows = [{"prompt": p, "completion": a} for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    made: Any = made_by(
        model=model,
        args=SFTConfig(**options(folder, **own)),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:3]),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )
    return without_printing(made)


def dpo(model: Any, folder: Path, reference: Any = None, made_by: type[DPOTrainer] = DPOTrainer, **own: Any) -> Any:
    """A trainer on pairs of answers."""
    rows = [{"prompt": p, "chosen": a, "rejected": " c"} for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    made = made_by(
        model=model,
        ref_model=reference,
        args=DPOConfig(**options(folder, **own)),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:3]),
        processing_class=tokenizer(),
    )
    return without_printing(made)


def train_both_ways(folder: Path) -> None:
    """What a process without HF PEFT does: SFT by TRL alone and with the mixin, saved below a folder."""
    for name, made_by in (("plain", SFTTrainer), ("mixin", AdapterSFTTrainer)):
        made = sft(adapted(), folder / name, made_by)
        made.train()
        made.save_model(str(folder / name / "saved"))
