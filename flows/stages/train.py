"""Train the adapter on the base in its quantised storage, and keep the best by validation loss.

Interrupted at any point, it goes on from the last whole checkpoint when it is run again with the same parameters,
data and base, and ends as an uninterrupted run would have.
"""

import json
import logging
import shutil
from typing import Any, cast

from datasets import Dataset
from transformers import PreTrainedModel, ProgressCallback, TrainerState
from transformers.trainer_callback import PrinterCallback

from flows.adapter_choice import adapter_config
from flows.base_model import check_base, load_for_training, load_tokenizer, padding_id
from flows.errors import StageError
from flows.params import Params
from flows.paths import Paths
from flows.rows import read_rows
from flows.stage import set_seed, start
from flows.tracking import Tracker
from flows.training_arguments import training_arguments
from flows.training_callbacks import (
    EvaluateAt,
    ShowProgress,
    StopWithoutGain,
    WriteLog,
    evaluations_since_best,
    evenly_spread,
)
from flows.training_log import TrainingLog, loss_table
from flows.training_run import Run, optimizer_steps, run_key
from peftcore import TrainingError, get_peft_model, initialize_from_data
from peftcore.files import directory_written_atomically, write_atomically
from peftcore.init import DATA_STARTS
from peftcore.merge import check_mergeable
from peftcore.train import AdapterTrainer, PackedCollator, Packs, RightPaddingCollator, last_good_checkpoint

log = logging.getLogger(__name__)

BATCHES_FOR_START = 32
"""Batches that a start from data looks at."""


def run(params: Params, paths: Paths) -> None:
    """Train; writes the adapter and the run's records, then removes the run's checkpoints."""
    base = check_base(paths.base)
    columns = ["input_ids", "labels"]
    rows = {name: Dataset.from_list(read_rows(paths.split(name), columns)) for name in ("train", "validation")}
    training_set = _training_set(params, rows["train"])
    folder = paths.checkpoints / run_key(params, paths, base)
    this = Run(folder, last_good_checkpoint(folder), optimizer_steps(params, training_set))
    records = this.log.keep_until(this.state.global_step)
    if this.checkpoint is not None:
        log.info("resuming from step %d of %d", this.state.global_step, this.total_steps)

    set_seed(params.project.seed)
    model = cast(PreTrainedModel, load_for_training(paths.base, params.quantization, _longest(rows)))
    model = get_peft_model(model, adapter_config(params, this.total_steps))
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
            args=training_arguments(params, this.folder, this.total_steps),
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
