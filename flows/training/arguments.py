"""Arguments of transformers' Trainer for the section `train` of params.yaml."""

import math
from pathlib import Path

import torch
from transformers import TrainingArguments

from flows.errors import StageError
from flows.params import Params
from peftcore.train import FaultPolicy

OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}
"""{train.optimizer: transformers' name}"""


def fault_policy(params: Params) -> FaultPolicy:
    """Return the trainer's policy for batches that do not fit into memory, and for bad losses."""
    train = params.train
    return FaultPolicy(
        on_out_of_memory=train.on_out_of_memory,
        on_bad_loss=train.on_bad_loss,
        spike_deviations=train.spike_deviations,
        spike_window=train.spike_window,
        max_rollbacks=train.max_rollbacks,
    )


def training_arguments(params: Params, folder: Path, total_steps: int) -> TrainingArguments:
    """Return the arguments of a run of `total_steps` optimiser steps with checkpoints in `folder`.

    Raises:
        StageError: The run is too short for `train.warmup_steps`.
    """
    train = params.train
    schedule = "constant_with_warmup" if train.schedule == "constant" else train.schedule
    padded = train.batching in ("grouped", "padded")
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=total_steps,
        per_device_train_batch_size=1 if train.batching == "packed" else train.batch_size,
        per_device_eval_batch_size=2 * train.batch_size,
        gradient_accumulation_steps=train.gradient_accumulation,
        train_sampling_strategy="group_by_length" if train.batching == "grouped" else "random",
        optim=OPTIMIZERS[train.optimizer],
        learning_rate=train.learning_rate,
        lr_scheduler_type=schedule,
        warmup_steps=_warmup_steps(params, total_steps),
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        # EvaluateAt decides the steps; these only switch evaluation and saving on, with the last step included
        eval_strategy="steps",
        eval_steps=total_steps,
        save_strategy="steps",
        save_steps=total_steps,
        save_total_limit=train.save_checkpoints,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        prediction_loss_only=True,
        logging_steps=max(1, total_steps // 200),
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding" if padded else "all",
        report_to=[],
        disable_tqdm=False,
        log_level="error",
        use_cpu=not torch.cuda.is_available(),  # otherwise several processes count as one
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=params.project.seed,
    )


def _warmup_steps(params: Params, total_steps: int) -> int:
    steps = params.train.warmup_steps
    if steps is None:
        return math.ceil(params.train.warmup_share * total_steps)
    if steps >= total_steps:
        raise StageError(
            f"train.warmup_steps is {steps}, and the run has {total_steps} steps, so it would end before the learning "
            "rate is reached; give fewer, or null for train.warmup_share"
        )
    return steps
