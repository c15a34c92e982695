"""One training of `benchmarks.precision`, in a process of its own so that its peak memory is its own.

python -m benchmarks.precision_side TASK.json RESULT.json
"""

import json
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from benchmarks.memory import peak_rss
from flows.base.folder import load_tokenizer, padding_id
from flows.base.model import load_for_training
from flows.data.rows import read_rows
from flows.params import Quantization
from peftcore import LoraConfig, get_peft_model
from peftcore.train import AdapterTrainer, RightPaddingCollator

PRECISIONS = {
    "fp32": Quantization(storage="none", compute_dtype="float32"),
    "bf16": Quantization(storage="none", compute_dtype="bfloat16"),
    "fp16": Quantization(storage="none", compute_dtype="float16"),
    "NF4, bf16": Quantization(storage="nf4", compute_dtype="bfloat16"),
}
"""{name: storage and type of the frozen base; adapters are in float32 in all}"""


@dataclass(frozen=True)
class Task:
    """What one training is to do."""

    precision: str
    steps: int
    batch: int
    """Rows of a step."""
    learning_rate: float
    base: str
    data: str
    held_out: int
    """Validation rows judged at the end."""
    seed: int
    output: str


@dataclass
class Result:
    """What came out; one entry a step in the lists."""

    precision: str
    losses: list[float]
    gradient_norms: list[float]
    seconds: list[float]
    held_out_loss: float
    peak_memory: int
    """Bytes: of the GPU's allocator, or of the whole process without one."""
    loaded_memory: int
    """Bytes, of the same, before the first step."""
    skipped_steps: int
    loss_scale: float | None


class Clock(TrainerCallback):
    """Seconds, loss and gradient norm of each step, and a bar on a terminal."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seconds: list[float] = []
        self.records: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(total=state.max_steps, desc=self.name, unit="step", disable=None)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.began)
        self.bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.records.append(dict(logs))
            self.bar.set_postfix_str(f"loss {logs['loss']:.3f}", refresh=False)


def main() -> None:
    warnings.filterwarnings("ignore")
    disable_progress_bars()
    task, result = (Path(argument) for argument in sys.argv[1:3])
    result.write_text(json.dumps(asdict(train(Task(**json.loads(task.read_text(encoding="utf-8")))))), encoding="utf-8")


def train(task: Task) -> Result:
    """Train in one precision and judge it."""
    set_seed(task.seed)
    columns = ["input_ids", "labels"]
    limits = {"train": task.steps * task.batch, "validation": task.held_out}
    data = {
        name: Dataset.from_list(read_rows(Path(task.data) / f"{name}.parquet", columns, limit))
        for name, limit in limits.items()
    }
    longest = max(len(ids) for split in data.values() for ids in split["input_ids"])
    model: Any = load_for_training(Path(task.base), PRECISIONS[task.precision], longest)
    torch.manual_seed(task.seed)  # loading may have drawn numbers; all start from the same adapter
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    clock = Clock(task.precision)
    trainer = AdapterTrainer(
        model=model,
        args=arguments(task),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=RightPaddingCollator(padding_id(load_tokenizer(Path(task.base)))),
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    loaded = peak_memory()
    trainer.train()
    peak = peak_memory()
    scaler = trainer.accelerator.scaler
    return Result(
        precision=task.precision,
        losses=[record["loss"] for record in clock.records],
        gradient_norms=[record["grad_norm"] for record in clock.records],
        seconds=clock.seconds,
        held_out_loss=trainer.evaluate()["eval_loss"],
        peak_memory=peak,
        loaded_memory=loaded,
        skipped_steps=sum(record.get("skipped_steps", 0) for record in clock.records),
        loss_scale=None if scaler is None else scaler.get_scale(),
    )


def arguments(task: Task) -> TrainingArguments:
    return TrainingArguments(
        output_dir=task.output,
        max_steps=task.steps,
        per_device_train_batch_size=task.batch,
        per_device_eval_batch_size=task.batch,
        train_sampling_strategy="group_by_length",
        learning_rate=task.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, task.steps // 20),
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        prediction_loss_only=True,
        report_to=[],
        disable_tqdm=True,
        log_level="error",
        dataloader_pin_memory=False,
        use_cpu=not torch.cuda.is_available(),
        seed=task.seed,
    )


def peak_memory() -> int:
    """Most memory held so far (bytes): by the GPU's allocator, or by the process where there is none."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_rss()


if __name__ == "__main__":
    main()
