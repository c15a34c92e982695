"""Train the adapter on the base in its quantised storage, and keep the best by validation loss.

Interrupted at any point, it goes on from the last whole checkpoint when it is run again with the same parameters,
data and base, and ends as an uninterrupted run would have.
"""

import hashlib
import json
import logging
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from transformers import PreTrainedModel, ProgressCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from flows.base_model import check_base, load_for_training, load_tokenizer, padding_id
from flows.errors import StageError
from flows.params import AdaLora, Params
from flows.paths import Paths
from flows.rows import read_rows
from flows.stage import set_seed, start
from flows.tracking import Tracker
from flows.training_callbacks import (
    EvaluateAt,
    ShowProgress,
    StopWithoutGain,
    WriteLog,
    evaluations_since_best,
    evenly_spread,
)
from flows.training_log import TrainingLog, loss_table
from peftcore import PeftConfig, TaskType, TrainingError, get_peft_model, initialize_from_data
from peftcore.files import directory_written_atomically, sha256, write_atomically
from peftcore.init import DATA_STARTS
from peftcore.merge import check_mergeable
from peftcore.registry import method_named
from peftcore.train import AdapterTrainer, PackedCollator, Packs, RightPaddingCollator, last_good_checkpoint

log = logging.getLogger(__name__)

BATCHES_FOR_START = 32
"""Batches that a start from data looks at."""
OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}
"""{train.optimizer: what transformers calls it}"""


@dataclass(frozen=True)
class Run:
    """Where one run keeps its resumable state, and where it stands."""

    folder: Path
    checkpoint: Path | None
    """The last whole checkpoint; None at the start."""
    total_steps: int
    """Optimiser steps of the whole run."""

    @property
    def log(self) -> TrainingLog:
        return TrainingLog(self.folder / "log.jsonl")

    @property
    def state(self) -> TrainerState:
        """The trainer's state at the checkpoint."""
        if self.checkpoint is None:
            return TrainerState()
        return TrainerState.load_from_json(str(self.checkpoint / "trainer_state.json"))


def run(params: Params, paths: Paths) -> None:
    """Train; writes the adapter and the run's records, then removes the run's checkpoints."""
    base = check_base(paths.base)
    columns = ["input_ids", "labels"]
    rows = {name: Dataset.from_list(read_rows(paths.split(name), columns)) for name in ("train", "validation")}
    training_set = _training_set(params, rows["train"])
    folder = paths.checkpoints / _key(params, paths, base)
    this = Run(folder, last_good_checkpoint(folder), _optimizer_steps(params, training_set))
    records = this.log.keep_until(this.state.global_step)
    if this.checkpoint is not None:
        log.info("resuming from step %d of %d", this.state.global_step, this.total_steps)

    set_seed(params.project.seed)
    model = cast(PreTrainedModel, load_for_training(paths.base, params.quantization, _longest(rows)))
    model = get_peft_model(model, _adapter_config(params, this.total_steps))
    check_mergeable(model, ["default"])  # the pipeline ends in a merged model: better said before training than after
    collate = RightPaddingCollator(padding_id(load_tokenizer(paths.base)))
    _start_from_data(model, rows["train"], collate, params.train.batch_size)
    tracker = Tracker(params.tracking.project, params.tracking.mode, params.model_dump(), paths.root)
    try:
        for record in records:
            tracker.log(record)
        trainer = _trainer(params, this, model, training_set, rows["validation"], collate, tracker)
        _train(trainer, this, params.train.patience)
        model.save_pretrained(paths.adapter)
        summary = _summary(params, model, trainer.state, this.log, tracker.run_id)
        with directory_written_atomically(paths.training) as training:
            write_atomically(training / paths.training_summary.name, json.dumps(summary, indent=2) + "\n")
            write_atomically(training / paths.loss_curve.name, loss_table(this.log.records()))
            shutil.copyfile(this.log.path, training / paths.training_log.name)
        tracker.finish(summary, paths.adapter)
    finally:
        tracker.close()
    shutil.rmtree(folder)


def _train(trainer: AdapterTrainer, this: Run, patience: int) -> None:
    if this.checkpoint is not None and evaluations_since_best(this.state.log_history) >= patience:
        trainer.finish_from(this.checkpoint)  # it had stopped for good, and only the results were not written yet
    else:
        trainer.train(resume_from_checkpoint=None if this.checkpoint is None else str(this.checkpoint))


def _trainer(
    params: Params,
    this: Run,
    model: PreTrainedModel,
    training_set: Dataset | Packs,
    validation_set: Dataset,
    collate: RightPaddingCollator,
    tracker: Tracker,
) -> AdapterTrainer:
    before, train = this.log.records(), params.train
    try:
        trainer = AdapterTrainer(
            model=model,
            args=_arguments(params, this),
            train_dataset=training_set,
            eval_dataset=validation_set,
            data_collator=PackedCollator() if train.batching in ("padding_free", "packed") else collate,
            callbacks=[
                EvaluateAt(evenly_spread(this.total_steps, train.evaluations)),
                StopWithoutGain(train.patience),
                WriteLog(this.log, tracker.log, seconds=before[-1]["seconds"] if before else 0.0),
                ShowProgress(),
            ],
        )
    except TrainingError as error:
        raise StageError(
            f"train.batching is {train.batching} and train.optimizer is {train.optimizer}: {error}; grouped and adamw "
            "train any model on any machine"
        ) from error
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(params: Params, this: Run) -> TrainingArguments:
    train = params.train
    schedule = "constant_with_warmup" if train.schedule == "constant" else train.schedule
    padded = train.batching in ("grouped", "padded")
    return TrainingArguments(
        output_dir=str(this.folder),
        max_steps=this.total_steps,
        per_device_train_batch_size=1 if train.batching == "packed" else train.batch_size,
        per_device_eval_batch_size=2 * train.batch_size,
        gradient_accumulation_steps=train.gradient_accumulation,
        train_sampling_strategy="group_by_length" if train.batching == "grouped" else "random",
        optim=OPTIMIZERS[train.optimizer],
        learning_rate=train.learning_rate,
        lr_scheduler_type=schedule,
        warmup_steps=math.ceil(train.warmup_share * this.total_steps),
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        activation_checkpointing=train.gradient_checkpointing,
        fp16=params.quantization.compute_dtype == "float16",
        # EvaluateAt spreads them; these say that there are some, and that the last step is one.
        eval_strategy="steps",
        eval_steps=this.total_steps,
        save_strategy="steps",
        save_steps=this.total_steps,
        save_total_limit=train.save_checkpoints,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        prediction_loss_only=True,
        logging_steps=max(1, this.total_steps // 200),
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding" if padded else "all",
        report_to=[],
        disable_tqdm=True,
        log_level="error",
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=params.project.seed,
    )


def _adapter_config(params: Params, total_steps: int) -> PeftConfig:
    method = params.method
    options: dict[str, Any] = {
        "task_type": TaskType.CAUSAL_LM,
        "base_model_name_or_path": params.base.source,
        "target_modules": method.target_modules,
    }
    if method.name in ("lora", "adalora"):
        options |= {"lora_alpha": method.lora_alpha, "lora_dropout": method.lora_dropout}
    if method.name == "lora":
        options |= {"r": method.r, "use_rslora": method.use_rslora}
    if method.name == "adalora":
        options |= _adalora_options(method.adalora, total_steps)
    return method_named(method.name.upper()).config(**{**options, **method.options})


def _adalora_options(adalora: AdaLora, total_steps: int) -> dict[str, Any]:
    return {
        "init_r": adalora.init_r,
        "target_r": adalora.target_r,
        "tinit": int(adalora.warmup_share * total_steps),
        "tfinal": int(adalora.final_share * total_steps),
        "deltaT": adalora.interval,
        "orth_reg_weight": adalora.orth_reg_weight,
        "beta1": adalora.beta1,
        "beta2": adalora.beta2,
        "total_step": total_steps,
    }


def _start_from_data(model: Any, rows: Dataset, collate: RightPaddingCollator, batch_size: int) -> None:
    """Give a LoRA that starts from data (EVA, CorDA, LoRA-GA) that start, from the first training rows."""
    if getattr(model.peft_config["default"], "init_lora_weights", None) not in DATA_STARTS:
        return
    count = min(len(rows), BATCHES_FOR_START * batch_size)
    firsts = range(0, count, batch_size)
    initialize_from_data(
        model, [collate([rows[i] for i in range(first, min(first + batch_size, count))]) for first in firsts]
    )


def _longest(rows: dict[str, Dataset]) -> int:
    return max(len(ids) for split in rows.values() for ids in split["input_ids"])


def _training_set(params: Params, rows: Dataset) -> Dataset | Packs:
    if params.train.batching != "packed":
        return rows
    try:
        return Packs(rows, params.train.pack_tokens)
    except TrainingError as error:
        raise StageError(f"train.pack_tokens is {params.train.pack_tokens}: {error}") from error


def _optimizer_steps(params: Params, training_set: Dataset | Packs) -> int:
    """Optimiser steps of the run, as Trainer counts them: an epoch's last, smaller accumulation is one too."""
    if params.train.max_steps is not None:
        return params.train.max_steps
    at_once = 1 if isinstance(training_set, Packs) else params.train.batch_size
    batches = math.ceil(len(training_set) / at_once)
    return math.ceil(params.train.epochs * math.ceil(batches / params.train.gradient_accumulation))


def _key(params: Params, paths: Paths, base: str) -> str:
    """Names what a run is made of, so that only a checkpoint of the very same run is ever resumed."""
    sections = params.model_dump(include={"base", "method", "quantization", "train"})
    data = [sha256(paths.split(name)) for name in ("train", "validation")]
    made_of = json.dumps([params.project.seed, sections, base, data], sort_keys=True)
    return hashlib.sha256(made_of.encode()).hexdigest()[:16]


def _summary(
    params: Params, model: Any, state: TrainerState, training_log: TrainingLog, run_id: str | None
) -> dict[str, Any]:
    trainable, _ = model.get_nb_trainable_parameters()
    return {
        "method": params.method.name,
        "steps": state.global_step,
        "best_step": state.best_global_step,
        "best_validation_loss": state.best_metric,
        "seconds": training_log.records()[-1]["seconds"],
        "tokens": int(state.num_input_tokens_seen),
        "trainable_parameters": trainable,
        "wandb_run_id": run_id,
    }


if __name__ == "__main__":
    start(run)
