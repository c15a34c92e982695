"""TRL's trainers on tiny adapted models."""

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
    from trl import (
        DPOConfig,
        DPOTrainer,
        GRPOConfig,
        GRPOTrainer,
        KTOConfig,
        KTOTrainer,
        RewardConfig,
        RewardTrainer,
        RLOOConfig,
        RLOOTrainer,
        SFTConfig,
        SFTTrainer,
    )

PROMPTS = ["a b c", "a b", "c a", "b"]
ANSWERS = [" d e", " f g h", " b", " a e f"]
WITHOUT_ADAM: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.5}
"""Options for two processes with the same result: Adam makes the rounding of a tiny gradient as large as a step."""


class AdapterSFTTrainer(AdapterTrainerMixin, SFTTrainer):
    """The mixin over TRL's trainer."""


class AdapterDPOTrainer(AdapterTrainerMixin, DPOTrainer):
    """The mixin over TRL's trainer of pairs."""


class AdapterKTOTrainer(AdapterTrainerMixin, KTOTrainer):
    """The mixin over TRL's trainer of single answers, wanted or not."""


class AdapterGRPOTrainer(AdapterTrainerMixin, GRPOTrainer):
    """The mixin over TRL's trainer by rewards of groups."""


class AdapterRLOOTrainer(AdapterTrainerMixin, RLOOTrainer):
    """The mixin over TRL's trainer by rewards less those of the others."""


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


def kto(model: Any, folder: Path, reference: Any = None, made_by: type[KTOTrainer] = KTOTrainer, **own: Any) -> Any:
    """A trainer on answers of which every second one is wanted."""
    rows = [{"prompt": PROMPTS[n], "completion": ANSWERS[n], "label": n % 2 == 0} for n in range(len(PROMPTS))]
    made = made_by(
        model=model,
        ref_model=reference,
        args=KTOConfig(**options(folder, **own)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    return without_printing(made)


def rewards(model: Any, folder: Path, rows: list[dict[str, Any]], **own: Any) -> RewardTrainer:
    """A trainer of a reward model on pairs, which may have margins."""
    made = RewardTrainer(
        model=model,
        args=RewardConfig(**options(folder, **own)),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    return without_printing(made)


def by_rewards(model: Any, folder: Path, made_by: Any, **own: Any) -> Any:
    """A GRPO or RLOO trainer whose reward is an answer's length."""
    config = GRPOConfig if issubclass(made_by, GRPOTrainer) else RLOOConfig
    made = made_by(
        model=model,
        reward_funcs=lambda completions, **_: [float(len(each)) for each in completions],
        args=config(**options(folder, num_generations=2, max_completion_length=4, beta=0.1, **own)),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=tokenizer(),
    )
    return without_printing(made)


def train_both_ways(folder: Path) -> None:
    """What a process without HF PEFT does: SFT by TRL alone and with the mixin, saved below a folder."""
    for name, made_by in (("plain", SFTTrainer), ("mixin", AdapterSFTTrainer)):
        made = sft(adapted(), folder / name, made_by, **WITHOUT_ADAM)
        made.train()
        made.save_model(str(folder / name / "saved"))
