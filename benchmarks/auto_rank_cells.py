"""One cell of `benchmarks.auto_rank`: one adapter trained on one task from one seed, and judged on held-out rows."""

import math
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
    ProgressCallback,
    TrainingArguments,
    set_seed,
)

from flows.base.folder import padding_id
from flows.base.model import load_for_training
from flows.data.docstrings import pairs
from flows.data.rows import read_rows
from flows.evaluation.scoring import by_length, row_losses
from flows.params import Quantization
from peftcore import AdaLoraConfig, LoraConfig, PeftConfig, TaskType, get_peft_model
from peftcore.injection.adapter_set import adapter_set
from peftcore.train import AdapterTrainer, RightPaddingCollator
from peftcore.train.rank_search import RankSearch, find_ranks

FIXED, AUTO, ADALORA = "fixed", "auto", "adalora"
ARMS = (FIXED, AUTO, ADALORA)
DOCSTRINGS, MODULES, EPOCH = "docstrings", "modules", "epoch"
TASK_TYPES = {DOCSTRINGS: TaskType.CAUSAL_LM, EPOCH: TaskType.CAUSAL_LM, MODULES: TaskType.SEQ_CLS}
RANK, ALPHA = 16, 32
RATES = {FIXED: 5e-4, AUTO: 5e-4, ADALORA: 2e-3}
"""Learning rates at their peak: LoRA's are the pipeline's; AdaLoRA's λ starts at zero between small P and Q."""
BATCH = 8
SEARCH_BATCHES, CREDIT_BATCHES = 8, 4
"""Of BATCH training rows: those that the search trains on, and those that it judges by."""
CLASSES = 8
LONGEST = 128
"""Tokens of a function whose module is asked for."""
HELD_OUT_PER_CLASS = 16


@dataclass(frozen=True)
class Cell:
    """task: one of the above. arm: FIXED, AUTO or ADALORA."""

    task: str
    arm: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}-{self.arm}-{self.seed}"


@dataclass
class Result:
    """Seconds are the process's CPU time, which on one thread and a busy machine is the work alone."""

    cell: Cell
    rows: int
    steps: int
    trainable: int
    """Parameters at the end, the classification's head among them."""
    search_seconds: float
    train_seconds: float
    losses: list[float]
    """Of each held-out row: nats a supervised token, or nats."""
    weights: list[int]
    """Supervised tokens of each held-out row; 1 where a row is one answer."""
    right: list[bool] | None
    """Whether each row's most likely class is the true one."""
    ranks: dict[str, int]
    search: dict[str, Any] | None


@dataclass(frozen=True)
class Data:
    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    collate: Callable[[Sequence[Any]], dict[str, Tensor]]


def run_cell(cell: Cell, rows: int, held_out: int, base: Path, data: Path, scratch: Path) -> Result:
    """Train and judge; rows and held_out: counts (held_out is CLASSES x HELD_OUT_PER_CLASS for the modules)."""
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    found = (module_rows if cell.task == MODULES else docstring_rows)(cell, rows, held_out, data, tokenizer)
    set_seed(cell.seed)
    model = load(cell.task, base, padding_id(tokenizer))
    accumulation = 2 if cell.task == EPOCH else 1
    steps = -(-len(found.train) // (BATCH * accumulation))
    started = time.process_time()
    config, search = configuration(cell, model, found, steps)
    search_seconds = time.process_time() - started
    set_seed(cell.seed)
    model = get_peft_model(model, config)
    trainer = trainer_of(cell, model, found, accumulation, steps, scratch)
    started = time.process_time()
    trainer.train()
    train_seconds = time.process_time() - started
    model.eval()
    losses, weights, right = judge(cell, model, found, padding_id(tokenizer))
    return Result(
        cell=cell,
        rows=len(found.train),
        steps=trainer.state.global_step,
        trainable=model.get_nb_trainable_parameters()[0],
        search_seconds=search_seconds if search is not None else 0.0,
        train_seconds=train_seconds,
        losses=losses,
        weights=weights,
        right=right,
        ranks=ranks_of(model),
        search=None if search is None else asdict(search),
    )


# -- data ------------------------------------------------------------------------------------------------------------


def docstring_rows(cell: Cell, rows: int, held_out: int, data: Path, tokenizer: Any) -> Data:
    """A choice by the seed of the pipeline's training rows; of the whole epoch, the rows as they come."""
    every = read_rows(data / "train.parquet", ["input_ids", "labels"])
    chosen = range(len(every)) if cell.task == EPOCH else numpy.random.default_rng(cell.seed).permutation(len(every))
    test = read_rows(data / "test.parquet", ["input_ids", "labels"], None if cell.task == EPOCH else held_out)
    return Data([every[i] for i in chosen[:rows]], test, RightPaddingCollator(padding_id(tokenizer)))


def module_rows(cell: Cell, rows: int, held_out: int, data: Path, tokenizer: Any) -> Data:
    """Functions of the standard library's largest packages; asked for is the package. Held-out rows are always the
    same, the training rows a choice by the seed."""
    functions = [(pair.source, pair.module.split(".")[0]) for pair in pairs(Path(sysconfig.get_paths()["stdlib"]))]
    largest = [name for name, _ in Counter(name for _, name in functions).most_common(CLASSES)]
    train, test = [], []
    for label, name in enumerate(largest):
        own = [source for source, module in functions if module == name]
        order = numpy.random.default_rng(0).permutation(len(own))
        test += [(own[i], label) for i in order[: held_out // CLASSES]]
        others = numpy.random.default_rng(cell.seed).permutation(order[held_out // CLASSES :])
        train += [(own[i], label) for i in others[: rows // CLASSES]]
    mixed = [train[i] for i in numpy.random.default_rng(cell.seed).permutation(len(train))]

    def tokenised(texts: list[tuple[str, int]]) -> list[dict[str, Any]]:
        ids = tokenizer([text for text, _ in texts], truncation=True, max_length=LONGEST)["input_ids"]
        return [{"input_ids": own, "labels": label} for own, (_, label) in zip(ids, texts, strict=True)]

    return Data(tokenised(mixed), tokenised(test), LabelCollator(RightPaddingCollator(padding_id(tokenizer))))


@dataclass
class LabelCollator:
    """Rows {"input_ids", "labels": class} -> tensors (B, T) and labels (B,)."""

    pad: RightPaddingCollator

    def __call__(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        padded = self.pad([{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows])
        return padded | {"labels": torch.tensor([row["labels"] for row in rows])}


# -- model -----------------------------------------------------------------------------------------------------------


def load(task: str, base: Path, pad: int) -> Any:
    """The base in bf16, in NF4 for the whole epoch, which is the pipeline's; with a new head for the modules."""
    if task != MODULES:
        return load_for_training(base, Quantization(storage="nf4" if task == EPOCH else "none"), longest=320)
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=CLASSES, dtype=torch.bfloat16, attn_implementation="eager", local_files_only=True
    )
    model.config.pad_token_id = pad
    return model.eval()


def configuration(cell: Cell, model: nn.Module, data: Data, steps: int) -> tuple[PeftConfig, RankSearch | None]:
    common: dict[str, Any] = {
        "task_type": TASK_TYPES[cell.task],
        "target_modules": "all-linear",
        "lora_alpha": ALPHA,
    }
    if cell.arm == ADALORA:
        return AdaLoraConfig(
            init_r=24,
            target_r=RANK,
            tinit=round(0.1 * steps),
            tfinal=round(0.3 * steps),
            deltaT=max(1, steps // 20),
            total_step=steps,
            **common,
        ), None
    config = LoraConfig(r=RANK, **common)
    if cell.arm == FIXED:
        return config, None
    starts = range(0, BATCH * (SEARCH_BATCHES + CREDIT_BATCHES), BATCH)
    batches = [data.collate(rows) for first in starts if (rows := data.train[first : first + BATCH])]
    search = find_ranks(
        model,
        config,
        batches[: len(batches) * SEARCH_BATCHES // (SEARCH_BATCHES + CREDIT_BATCHES)],
        batches[len(batches) * SEARCH_BATCHES // (SEARCH_BATCHES + CREDIT_BATCHES) :],
        learning_rate=RATES[AUTO],
        seed=cell.seed,
        progress=False,
    )
    return search.config_for(config), search


def trainer_of(cell: Cell, model: Any, data: Data, accumulation: int, steps: int, scratch: Path) -> AdapterTrainer:
    trainer = AdapterTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(scratch),
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=1,
            learning_rate=RATES[cell.arm],
            lr_scheduler_type="cosine",
            warmup_steps=math.ceil(0.05 * steps),
            weight_decay=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            train_sampling_strategy="group_by_length",
            seed=cell.seed,
        ),
        train_dataset=Dataset.from_list(data.train),
        data_collator=data.collate,
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


def ranks_of(model: Any) -> dict[str, int]:
    """{path: rank} of the adapter that acts."""
    found: dict[str, Any] = adapter_set(model).of_method("default")
    return {path: len(adapter.lora_A_weight) for path, adapter in found.items()}


@torch.no_grad()
def judge(cell: Cell, model: Any, data: Data, pad: int) -> tuple[list[float], list[int], list[bool] | None]:
    if cell.task != MODULES:
        found = row_losses(model, data.held_out, pad, BATCH)
        return found.means, found.tokens, None
    losses, right = [0.0] * len(data.held_out), [False] * len(data.held_out)
    for batch in by_length([len(row["input_ids"]) for row in data.held_out], BATCH):
        inputs = data.collate([data.held_out[i] for i in batch])
        labels = inputs.pop("labels")
        logits = model(**inputs).logits.float()
        rows = F.cross_entropy(logits, labels, reduction="none").tolist()
        for i, loss, best, label in zip(batch, rows, logits.argmax(1).tolist(), labels.tolist(), strict=True):
            losses[i], right[i] = loss, best == label
    return losses, [1] * len(losses), right
