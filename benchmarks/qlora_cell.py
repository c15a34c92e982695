"""One cell of `benchmarks.qlora`: one base storage, untrained or trained from one seed, judged on held-out rows.

Training and judging are the pipeline's own: the base in its storage for the one, and the weights that it stands for as
plain bf16 layers, with the adapter beside them, for the other. So every cell is judged by the same code.
"""

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainingArguments, set_seed

from flows.base.folder import load_tokenizer, padding_id
from flows.base.model import load_dequantized, load_for_training, load_original
from flows.data.rows import Row, read_rows
from flows.evaluation.scoring import row_losses
from flows.params import Quantization
from peftcore import LoraConfig, PeftModel, TaskType, get_peft_model, replace_lora_weights_loftq
from peftcore.injection.adapter_set import adapter_set
from peftcore.train import AdapterTrainer, RightPaddingCollator


@dataclass(frozen=True)
class Arm:
    """How the frozen base is kept, and where the adapter starts."""

    title: str
    storage: str
    loftq: bool = False

    @property
    def quantization(self) -> Quantization:
        return Quantization.model_validate({"storage": self.storage})  # double quantisation, bf16 compute


ARMS = {
    "bf16": Arm("16-bit (LoRA)", "none"),
    "nf4": Arm("NF4 (QLoRA)", "nf4"),
    "nf4-loftq": Arm("NF4, LoftQ start", "nf4", loftq=True),
    "fp4": Arm("FP4", "fp4"),
    "int8": Arm("int8", "int8"),
}


@dataclass(frozen=True)
class Setting:
    """What all cells of a table have in common."""

    base: Path
    data: Path
    train_rows: int
    test_rows: int
    rank: int
    learning_rate: float
    batch: int
    accumulation: int


def measure_cell(setting: Setting, arm: Arm, seed: int | None) -> dict[str, Any]:
    """Train one arm from a seed (None: not at all) and judge it.

    Gives each held-out row's mean loss (nats a token) and tokens; of an untrained arm also the relative distance of
    base and start to the 16-bit weights; of a trained one the CPU seconds of `train()`.
    """
    set_seed(seed or 0)
    columns = ["input_ids", "labels"]
    rows = read_rows(setting.data / "train.parquet", columns, setting.train_rows)
    model = adapted(setting, arm, max(len(row["input_ids"]) for row in rows))
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        if seed is None:
            found["weight_error"] = weight_error(model, setting.base)
        else:
            found |= train(setting, model, rows, seed, scratch)
        adapter: Any = model
        adapter.save_pretrained(scratch)
        del model, adapter
        judged = PeftModel.from_pretrained(load_dequantized(setting.base, arm.quantization), scratch)
    pad = padding_id(load_tokenizer(setting.base))
    held_out = read_rows(setting.data / "test.parquet", columns, setting.test_rows)
    losses = row_losses(judged, held_out, pad, batch_size=16)
    return found | {"losses": losses.means, "tokens": losses.tokens}


def adapted(setting: Setting, arm: Arm, longest: int) -> Any:
    """The base in the arm's storage with its adapter at the start; one seed gives every arm the same A and B = 0."""
    config = LoraConfig(
        r=setting.rank, lora_alpha=2 * setting.rank, target_modules="all-linear", task_type=TaskType.CAUSAL_LM
    )
    model = get_peft_model(load_for_training(setting.base, arm.quantization, longest), config)
    if arm.loftq:
        replace_lora_weights_loftq(model, setting.base)
    return model


def train(setting: Setting, model: Any, rows: list[Row], seed: int, folder: str) -> dict[str, Any]:
    """One epoch; batches depend on the seed alone."""
    trainer = AdapterTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=setting.batch,
            gradient_accumulation_steps=setting.accumulation,
            train_sampling_strategy="group_by_length",
            learning_rate=setting.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=not sys.stderr.isatty(),
            log_level="error",
            dataloader_pin_memory=False,
            seed=seed,
        ),
        train_dataset=Dataset.from_list(rows),
        data_collator=RightPaddingCollator(padding_id(load_tokenizer(setting.base))),
    )
    trainer.remove_callback(PrinterCallback)
    start = time.process_time()
    trainer.train()
    return {"seconds": time.process_time() - start, "steps": trainer.state.global_step}


@torch.no_grad()
def weight_error(model: Any, base: Path) -> float:
    """‖W − (Q + s·BA)‖ / ‖W‖ over all adapted layers together, W the 16-bit weights and Q the base's."""
    original = load_original(base, torch.float32)
    lost, whole = 0.0, 0.0
    for path, adapter in adapter_set(model).adapters("default").items():
        weight: Any = original.get_submodule(path).weight
        now = adapter.merged_weight(adapter.base.read().float())
        lost += (weight - now).double().square().sum().item()
        whole += weight.double().square().sum().item()
    return (lost / whole) ** 0.5
