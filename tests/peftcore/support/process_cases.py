"""Trainings of a tiny adapted Llama that one process and a group of them do alike, for tests of several processes.

A case is a function of a folder and of the forward passes that an optimiser step accumulates in each process.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from quiet_training import quiet_arguments, trained, without_printing
from tiny_training import adapted, rows, trainer
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, BertModel, Trainer, TrainingArguments

from peftcore import LoraConfig, get_peft_model
from peftcore.train import (
    EmbeddingCollator,
    EmbeddingTrainer,
    PackedCollator,
    Packs,
    RerankingCollator,
    RerankingTrainer,
    RightPaddingCollator,
)

STEPS = 4
"""Three are an epoch."""
Outcome = dict[str, Any]


def numbered_rows(count: int, seed: int = 0) -> Dataset:
    """`rows` whose first token is the row's number, from 1."""
    given = rows(count, seed)
    ids = [[number, *row["input_ids"][1:]] for number, row in enumerate(given, 1)]
    return Dataset.from_dict({"input_ids": ids, "labels": given["labels"]})


def batching(kind: str, count: int) -> dict[str, Any]:
    """A trainer's options for one kind of batches of two rows, or of one pack."""
    data = numbered_rows(count)
    if kind == "packed":
        return {"data": Packs(data, 32), "data_collator": PackedCollator(), "per_device_train_batch_size": 1}
    sampling = {"train_sampling_strategy": "group_by_length" if kind == "grouped" else "random"}
    collator = {"data_collator": PackedCollator()} if kind == "padding_free" else {}
    return {"data": data, "per_device_train_batch_size": 2, **sampling, **collator}


def run(kind: str, folder: Path, accumulation: int, method: str = "lora", **options: Any) -> Outcome:
    """AdapterTrainer in float64; 17 rows do not come out even."""
    model = adapted(method, dtype=torch.float64).double()
    given = {"gradient_accumulation_steps": accumulation, "per_device_eval_batch_size": 2, "max_steps": STEPS}
    made = trainer(model, folder, **(given | options), **batching(kind, 17))
    made.train()
    return outcome(made, model)


def outcome(made: Any, model: Any) -> Outcome:
    metrics = made.evaluate()
    return {
        "losses": [record["loss"] for record in made.state.log_history if "loss" in record],
        "adapter": trained(model),
        "evaluation": (metrics["eval_loss"], metrics.get("eval_tokens", 0)),
        "kept": {path: a.kept.tolist() for path, a in model_adapters(model).items() if hasattr(a, "kept")},
    }


def model_adapters(model: Any) -> dict[str, Any]:
    return {path: module.adapters["default"] for path, module in model.named_modules() if hasattr(module, "adapters")}


def plain_trainer(folder: Path, accumulation: int) -> Outcome:
    """transformers' Trainer and nothing of ours but the model; as many rows as come out even."""
    model = adapted(dtype=torch.float64).double()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        log_level="error",
    )
    made = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows(16),
        eval_dataset=rows(8, seed=1),
        data_collator=RightPaddingCollator(0),
    )
    made.callback_handler.callbacks.pop()  # no printing
    made.train()
    losses = [record["loss"] for record in made.state.log_history if "loss" in record]
    return {"losses": losses, "adapter": trained(model), "evaluation": None, "kept": {}}


def plain_loop(folder: Path, accumulation: int) -> Outcome:
    """accelerate without a Trainer: rows of one length, so that a mean of the processes' means is the mean."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model = adapted(dtype=torch.float64).double()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loader = DataLoader(torch.arange(1, 1 + 16 * 7).remainder(50).view(16, 7), batch_size=2)  # type: ignore[arg-type]
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for _ in range(3):
        for tokens in loader:
            with accelerator.accumulate(wrapped):
                loss = wrapped(input_ids=tokens, labels=tokens).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
    rounds = torch.tensor(losses).view(-1, accumulation).mean(1)
    return {"losses": rounds.tolist(), "adapter": trained(model), "evaluation": None, "kept": {}}


_ENCODER = BertConfig(
    vocab_size=60,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    num_labels=1,
)


def retrieval(trainer_class: Any, base_class: Any, collator: Any, folder: Path, accumulation: int) -> Outcome:
    """A trainer whose batches have no labels; 9 rows with different numbers of passages do not come out even."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"target_modules": ["query", "value"], "init_lora_weights": False}
    model = get_peft_model(base_class(_ENCODER), LoraConfig(r=2, **options)).double()
    data = [
        {
            "query_input_ids": [2, 10 + n],
            "positive_input_ids": [2, 10 + n, 3],
            "negatives_input_ids": [[2, 10 + n, 5 + k] for k in range(n % 3)],
            "pairs_input_ids": [[2, 10 + n, 3 + k] for k in range(1 + n % 3)],
            "weight": 1.0 + n,
        }
        for n in range(9)
    ]
    batches: dict[str, Any] = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "max_steps": STEPS}
    sampling = {"gradient_accumulation_steps": accumulation, "train_sampling_strategy": "sequential"}
    made = without_printing(
        trainer_class(
            model=model,
            args=quiet_arguments(folder, **batches, **sampling),
            train_dataset=data,
            eval_dataset=data,
            data_collator=collator,
        )
    )
    made.train()
    return outcome(made, model)


EQUAL: dict[str, Callable[[Path, int], Outcome]] = {
    **{kind: partial(run, kind) for kind in ("grouped", "random", "padding_free", "packed")},
    "checkpointed activations": partial(run, "grouped", activation_checkpointing=True),
    "adalora": partial(run, "grouped", method="adalora", max_steps=8),
    "embeddings": partial(retrieval, EmbeddingTrainer, BertModel, EmbeddingCollator(0)),
    "reranking": partial(retrieval, RerankingTrainer, BertForSequenceClassification, RerankingCollator(0)),
    "plain Trainer": plain_trainer,
    "plain loop": plain_loop,
}
