"""One side of `benchmarks.epoch`: one training, in a process of its own so that its peak memory is its own.

    python -m benchmarks.epoch_side TASK.json RESULT.json

Both sides load the same base and the same start adapter from disk and differ in nothing but what the task says.
"""

import hashlib
import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset, disable_progress_bars
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from benchmarks.memory import peak_rss
from flows.base.folder import padding_id
from flows.data.rows import read_rows
from peftcore.train import RightPaddingCollator

OURS, TRL, TRL_NO_CHECKPOINTING = "ours", "TRL", "TRL, no checkpointing"


@dataclass(frozen=True)
class Task:
    """What one side is to do; `same`: whether both sides see the same batches."""

    side: str
    same: bool
    base: str
    start: str
    """Folder of the adapter that training starts from."""
    train: str
    validation: str
    """Parquet files of rows; where `same`, the training rows lie in the order in which they are seen."""
    rows: int | None
    """Training rows (count); None: all."""
    batch: int
    accumulation: int
    learning_rate: float
    attention: str
    autocast: bool
    """Whether the trainer's bf16 autocast is on; the base is in bf16 in either case."""
    checkpointing: bool
    seed: int
    output: str


@dataclass
class Result:
    """What came out; seconds are those of `train()` alone, and the curve's are counted from its call."""

    side: str
    seconds: float
    cpu_seconds: float
    """Of the process, all threads: on a busy machine the steadier figure."""
    steps: int
    curve_seconds: list[float]
    curve_losses: list[float]
    """Mean loss of each optimiser step's tokens (nats)."""
    held_out_loss: float
    peak_rss: int
    tokens: int
    padded_tokens: int
    """Positions that went through the model, padding included."""
    trainable: int
    start_norm: float
    """Norm of all trainable weights before training."""
    batches: list[str] = field(default_factory=list)
    """A digest of each batch's ids, labels and mask."""


def main() -> None:
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    task, result = (Path(argument) for argument in sys.argv[1:3])
    result.write_text(json.dumps(asdict(train(Task(**json.loads(task.read_text(encoding="utf-8")))))), encoding="utf-8")


def train(task: Task) -> Result:
    """Train one side and judge it."""
    set_seed(task.seed)
    trainer = (our_trainer if task.side == OURS else their_trainer)(task)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    collator = Recorder(trainer.data_collator)
    trainer.data_collator = collator
    model: Any = trainer.model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    start_norm = math.sqrt(sum(parameter.detach().double().square().sum().item() for parameter in trained))
    clock = Clock(task.side)
    trainer.add_callback(clock)
    clock.start, cpu_start = time.perf_counter(), time.process_time()
    trainer.train()
    seconds, cpu_seconds = time.perf_counter() - clock.start, time.process_time() - cpu_start
    memory = peak_rss()
    return Result(
        side=task.side,
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        steps=trainer.state.global_step,
        curve_seconds=clock.seconds,
        curve_losses=clock.losses,
        held_out_loss=held_out_loss(model, task),
        peak_rss=memory,
        tokens=collator.tokens,
        padded_tokens=collator.padded_tokens,
        trainable=sum(parameter.numel() for parameter in trained),
        start_norm=start_norm,
        batches=collator.batches,
    )


# -- the two trainers --------------------------------------------------------------------------------------------


def arguments(task: Task) -> dict[str, Any]:
    """What both are told; anything else is the trainer's own default."""
    given: dict[str, Any] = {
        "output_dir": task.output,
        "per_device_train_batch_size": task.batch,
        "gradient_accumulation_steps": task.accumulation,
        "num_train_epochs": 1,
        "learning_rate": task.learning_rate,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "log_level": "error",
        "dataloader_pin_memory": False,
        "use_cpu": not torch.cuda.is_available(),
        "seed": task.seed,
    }
    if task.same:
        given["train_sampling_strategy"] = "sequential"
    return given


def base_model(task: Task) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        task.base, dtype=torch.bfloat16, attn_implementation=task.attention, local_files_only=True
    )


def training_rows(task: Task, columns: list[str]) -> list[dict[str, Any]]:
    return read_rows(Path(task.train), columns, task.rows)


def our_trainer(task: Task) -> Trainer:
    """AdapterTrainer on a peftcore adapter."""
    import peftcore  # each side imports its own tool alone: an import is memory too
    from peftcore.train import AdapterTrainer

    model = peftcore.PeftModel.from_pretrained(base_model(task), task.start, is_trainable=True)
    given = arguments(task)
    given.setdefault("train_sampling_strategy", "group_by_length")
    return AdapterTrainer(
        model=model,
        args=TrainingArguments(bf16=task.autocast, activation_checkpointing=task.checkpointing, **given),
        train_dataset=Dataset.from_list(training_rows(task, ["input_ids", "labels"])),
        data_collator=collator_of(task),
    )


def their_trainer(task: Task) -> Trainer:
    """TRL's SFTTrainer on a PEFT adapter: our batches, or, by default, rows of text that it prepares itself."""
    import peft
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(task.base, local_files_only=True)
    model = peft.PeftModel.from_pretrained(base_model(task), task.start, is_trainable=True)
    columns = ["input_ids", "labels"] if task.same else ["prompt", "completion"]
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(bf16=task.autocast, gradient_checkpointing=task.checkpointing, **arguments(task)),
        train_dataset=Dataset.from_list(training_rows(task, columns)),
        data_collator=collator_of(task) if task.same else None,
        processing_class=tokenizer,
    )
    check_labels(trainer, training_rows(task, ["input_ids", "labels"]))
    return trainer


def collator_of(task: Task) -> RightPaddingCollator:
    return RightPaddingCollator(padding_id(AutoTokenizer.from_pretrained(task.base, local_files_only=True)))


def check_labels(trainer: Trainer, rows: list[dict[str, Any]]) -> None:
    """Stop unless what TRL prepared is what we train on, token for token."""
    prepared: Any = trainer.train_dataset
    if len(prepared) != len(rows):
        raise SystemExit(f"error: TRL kept {len(prepared)} of {len(rows)} rows")
    for number, (theirs, ours) in enumerate(zip(prepared, rows, strict=True)):
        for name in ("input_ids", "labels"):
            if list(theirs[name]) != list(ours[name]):
                raise SystemExit(f"error: row {number}: TRL's {name} differ from ours")


# -- what is recorded --------------------------------------------------------------------------------------------


class Recorder:
    """A collator that also counts and identifies what it made."""

    def __init__(self, collate: Callable[..., dict[str, Tensor]]) -> None:
        self.collate = collate
        self.batches: list[str] = []
        self.tokens = 0
        self.padded_tokens = 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self.collate(rows)
        content = b"".join(batch[name].numpy().tobytes() for name in ("input_ids", "labels", "attention_mask"))
        self.batches.append(hashlib.sha256(content).hexdigest()[:16])
        self.tokens += int(batch["attention_mask"].sum())
        self.padded_tokens += batch["input_ids"].numel()
        return batch


class Clock(TrainerCallback):
    """Each optimiser step's loss and when it was done, and a bar on a terminal."""

    def __init__(self, side: str) -> None:
        self.side = side
        self.start = 0.0
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(total=state.max_steps, desc=self.side, unit="step", disable=None)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.seconds.append(time.perf_counter() - self.start)
            self.losses.append(float(logs["loss"]))
            self.bar.set_postfix_str(f"loss {self.losses[-1]:.3f}", refresh=False)
            self.bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


@torch.no_grad()
def held_out_loss(model: Any, task: Task) -> float:
    """Mean loss of the validation rows' supervised tokens (nats), by a plain forward that is the same for both."""
    model.eval()
    collate, total, tokens = collator_of(task), 0.0, 0
    rows = sorted(read_rows(Path(task.validation), ["input_ids", "labels"]), key=lambda row: len(row["input_ids"]))
    for first in range(0, len(rows), 8):
        batch = collate(rows[first : first + 8])
        targets = batch["labels"][:, 1:]
        mask = targets != -100
        device = model.device
        logits = model(
            input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device)
        ).logits[:, :-1]
        total += F.cross_entropy(logits[mask.to(device)].float(), targets[mask].to(device), reduction="sum").item()
        tokens += int(mask.sum())
    return total / tokens


if __name__ == "__main__":
    main()
