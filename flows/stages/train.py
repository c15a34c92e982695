"""train: the adapter on the base in its quantised storage; the best checkpoint by validation loss is kept.

An interrupted run resumes from the last complete checkpoint when it is run again with the same parameters, data and
base, and ends like an uninterrupted run.

With several processes the stage starts itself in each. All train and compute the same values where they do not share
the work; only the main process shows progress, logs, writes results and removes checkpoints.
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback, TrainerCallback, TrainerState
from transformers.trainer_callback import PrinterCallback

from flows.base.calibrated import calibrated_identity, check_adapter, name_of_base, trained_base
from flows.base.corrected import write_corrected_storage
from flows.base.folder import check_base, load_tokenizer, padding_id
from flows.base.model import load_for_training
from flows.data.chat import end_token
from flows.errors import StageError
from flows.evaluation.scorers.rewards import training_rewards
from flows.params import Params
from flows.paths import Paths
from flows.runtime.progress import bars_closed
from flows.runtime.stage import set_seed, start
from flows.runtime.tracking import Backend, Tracker
from flows.training.adapter_choice import adapter_config, complete_manifest, token_rows
from flows.training.arguments import fault_policy, training_arguments
from flows.training.automatic_rank import FILE as RANKS
from flows.training.automatic_rank import with_automatic_ranks
from flows.training.callbacks import (
    EvaluateAt,
    ShowProgress,
    StopWithoutGain,
    WriteLog,
    evaluations_since_best,
    evenly_spread,
)
from flows.training.launcher import is_launched, joined, launch
from flows.training.loftq import attach_adapter
from flows.training.log import RANK_HISTORY, TrainingLog, loss_table
from flows.training.nodes import check_shared, this_node
from flows.training.objectives import (
    check_batching,
    longest,
    model_outputs,
    padded_collator,
    rows_of,
    start_batch,
    start_rows,
    trainer_of,
    training_collator,
    training_rows,
    unweighted_chats,
)
from flows.training.run import Run, optimizer_steps, run_key
from flows.training.teacher import load_teacher
from flows.training.warm_start import continue_adapter, starts_warm
from flows.validation.findings import require_valid
from peftcore import LoraConfig, TrainingError, check_mergeable, initialize_from_data
from peftcore.files import directory_written_atomically, write_atomically
from peftcore.train import (
    AdapterTrainer,
    OnPolicy,
    Packs,
    RightPaddingCollator,
    Sampling,
    last_good_checkpoint,
    recompute_activations,
)

log = logging.getLogger("flows.train")  # as a program this module is called __main__

ROWS_FOR_START = 96
"""Training rows of a data-driven initialisation (count)."""


def run(params: Params, paths: Paths) -> None:
    """Train, and remove the run's checkpoints."""
    if (remove_checkpoints := train(params, paths)) is not None:
        remove_checkpoints()


def train(params: Params, paths: Paths) -> Callable[[], None] | None:
    """Train, in the number of processes that the parameters say.

    Returns:
        The removal of the run's checkpoints, from which the run can be repeated until then; None in a process that has
        left it to another one.
    """
    if not is_launched():
        require_valid(paths)
    if params.train.all_processes > 1 and not is_launched():
        node = this_node(params.train.nodes)
        launch("flows.stages.train", params.train.processes, params.train.launcher, node)
        return None
    with joined(params.train.all_processes) as processes:
        return _run(params, paths, processes)


def _run(params: Params, paths: Paths, processes: PartialState) -> Callable[[], None] | None:
    """Train; writes the adapter and the run's records. Returns the removal of the run's checkpoints."""
    main = processes.is_main_process
    base_folder = trained_base(paths, params.quantization)
    base = check_base(base_folder)
    rows, labels = training_rows(params, paths), model_outputs(params, paths)
    training_set = _training_set(params, rows["train"])
    folder = paths.checkpoints / run_key(params, paths, base)
    check_shared(folder, processes, params.train.nodes)
    this = Run(folder, last_good_checkpoint(folder), optimizer_steps(params, training_set))
    records = this.log.keep_until(this.state.global_step) if main else []
    if this.checkpoint is not None:
        log.info("resuming from step %d of %d", this.state.global_step, this.total_steps)

    set_seed(params.project.seed)
    longest_row = longest(params, rows)
    model = cast(
        PreTrainedModel, load_for_training(base_folder, params.quantization, longest_row, labels, rows_of(params).task)
    )
    tokenizer = load_tokenizer(paths.base)
    pad = padding_id(tokenizer)
    config = replace(
        adapter_config(params, this.total_steps, token_rows(model, tokenizer, params.data.special_tokens)),
        base_model_name_or_path=name_of_base(params.base.source, base_folder),
    )
    teacher = load_teacher(params, paths, model, longest_row)
    warm = starts_warm(paths)
    if params.method.r == "auto" and not warm:
        chats, collate = unweighted_chats(params, rows["train"]), RightPaddingCollator(pad)
        with processes.main_process_first():
            config = with_automatic_ranks(params, cast(LoraConfig, config), model, chats, collate, folder)
    if warm:
        check_adapter(paths.start_adapter, calibrated_identity(base_folder))
        model = continue_adapter(params, paths, model, config)
    else:
        model = attach_adapter(params, model, config, paths.base)
    check_mergeable(model, ["default"])  # the pipeline merges the model: fail before training
    if not warm:
        _start_from_data(params, model, rows["train"], pad, paths.base, this.checkpoint is not None)
    recompute_activations(model, params.train.gradient_checkpointing)
    tracking = params.tracking
    tracker = Tracker(
        tracking.project,
        tracking.mode if main else "disabled",
        params.model_dump(),
        paths.root,
        backends=tracking.backends,
        mlflow_uri=tracking.mlflow_uri,
    )
    try:
        for record in records:
            tracker.log(record)
        trainer_class, options = trainer_of(params, rows["train"], labels, teacher)
        options |= {"train_dataset": training_set, "eval_dataset": rows["validation"]}
        options |= _generation_options(params, paths, tokenizer)
        options["data_collator"] = training_collator(params, padded_collator(params, pad, longest_row))
        trainer = _trainer(params, this, model, trainer_class, options, tracker if main else None)
        with bars_closed():
            _train(trainer, this, params.train.patience)
        processes.wait_for_everyone()  # the others have read the best checkpoint before its removal
        if not main:
            return None
        summary = _write_results(params, paths, this, model, trainer.state, tokenizer, tracker)
        tracker.finish(summary, paths.adapter)
    finally:
        tracker.close()
    return partial(shutil.rmtree, folder)


def _write_results(
    params: Params,
    paths: Paths,
    this: Run,
    model: Any,
    state: TrainerState,
    tokenizer: PreTrainedTokenizerBase,
    tracker: Tracker,
) -> dict[str, Any]:
    """Write the trained adapter and the records of the run; returns the summary."""
    model.save_pretrained(paths.adapter)
    write_corrected_storage(params, paths.adapter, paths.start_adapter)
    if params.data.special_tokens or params.data.chat_template:
        tokenizer.save_pretrained(paths.adapter)
    complete_manifest(paths.adapter)
    summary = _summary(params, model, state, this.log, tracker.run_ids)
    with directory_written_atomically(paths.training) as training:
        write_atomically(training / paths.training_summary.name, json.dumps(summary, indent=2) + "\n")
        write_atomically(training / paths.loss_curve.name, loss_table(this.log.records()))
        shutil.copyfile(this.log.path, training / paths.training_log.name)
        for name in (RANKS, RANK_HISTORY):
            if (this.folder / name).exists():
                shutil.copyfile(this.folder / name, training / name)
        _draw_ranks(model.adapter_ranks(), state.global_step, training, tracker)
    return summary


def _generation_options(params: Params, paths: Paths, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the trainer's arguments for answers that the model generates in training; {} for other objectives."""
    if share := params.train.distillation.on_policy:
        sampling = Sampling(params.train.distillation.max_new_tokens)
        return {"on_policy": OnPolicy([end_token(tokenizer)], share, sampling, padding_id(tokenizer))}
    if params.train.objective != "grpo":
        return {}
    rewards = training_rewards(params.train.grpo.rewards, paths.root)
    return {"tokenizer": tokenizer, "end_tokens": [end_token(tokenizer)], "rewards": rewards}


def _draw_ranks(ranks: dict[str, int], step: int, folder: Path, tracker: Tracker) -> None:
    """Write a heat map of the trained adapter's ranks if they differ between layers."""
    if len(set(ranks.values())) > 1:
        from flows.charts.ranks import HEAT_MAP, rank_heat_map, rank_picture  # imports matplotlib

        title = "Ranks of the trained adapter"
        write_atomically(folder / HEAT_MAP, str(rank_heat_map(ranks, title)))
        tracker.picture("ranks", rank_picture(ranks, title), step)


def _train(trainer: AdapterTrainer, this: Run, patience: int) -> None:
    if this.checkpoint is not None and evaluations_since_best(this.state.log_history) >= patience:
        trainer.finish_from(this.checkpoint)  # training had ended, only the results were not written
    else:
        trainer.train(resume_from_checkpoint=None if this.checkpoint is None else str(this.checkpoint))


def _trainer(
    params: Params,
    this: Run,
    model: PreTrainedModel,
    trainer_class: type[AdapterTrainer],
    options: dict[str, Any],
    tracker: Tracker | None,
) -> AdapterTrainer:
    """Return the trainer. tracker: of the main process, which alone logs and shows progress."""
    train = params.train
    callbacks: list[TrainerCallback] = [
        EvaluateAt(evenly_spread(this.total_steps, train.evaluations)),
        StopWithoutGain(train.patience),
    ]
    if tracker is not None:
        before = this.log.records()
        seconds = before[-1]["seconds"] if before else 0.0
        callbacks += [WriteLog(this.log, tracker.log, seconds=seconds), ShowProgress()]
    try:
        trainer = trainer_class(
            model=model,
            args=training_arguments(params, this.folder, this.total_steps),
            faults=fault_policy(params),
            **options,
            callbacks=callbacks,
        )
    except TrainingError as error:
        raise StageError(
            f"train.batching is {train.batching} and train.optimizer is {train.optimizer}: {error}; grouped and adamw "
            "work for any model on any machine"
        ) from error
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _start_from_data(params: Params, model: Any, rows: Dataset, pad: int, original: Path, resumes: bool) -> None:
    """Initialise a LoRA from the first training rows if its initialisation needs data, such as EVA or QERA.

    original: folder of the weights before quantisation, which QERA and CLoQ compare with the quantised ones.
    resumes: whether the adapter's tensors are read from a checkpoint next. QERA and CLoQ set nothing else; the others
        also change ranks or base weights.
    """
    config = model.peft_config["default"]
    if not config.needs_data or (resumes and config.needs_original):
        return
    size = params.train.batch_size
    firsts = start_rows(params, rows, ROWS_FOR_START)
    batches = [start_batch(params, firsts[first : first + size], pad) for first in range(0, len(firsts), size)]
    initialize_from_data(model, batches, model_path=original if config.needs_original else None)


def _training_set(params: Params, rows: Dataset) -> Dataset | Packs:
    check_batching(params)
    if params.train.batching != "packed":
        return rows
    try:
        return Packs(rows, params.train.pack_tokens)
    except TrainingError as error:
        raise StageError(f"train.pack_tokens is {params.train.pack_tokens}: {error}") from error


def _summary(
    params: Params, model: Any, state: TrainerState, training_log: TrainingLog, run_ids: Mapping[Backend, str]
) -> dict[str, Any]:
    trainable, _ = model.get_nb_trainable_parameters()
    others = {backend: run_id for backend, run_id in run_ids.items() if backend != "wandb"}
    return {
        "method": params.method.name,
        "steps": state.global_step,
        "best_step": state.best_global_step,
        "best_validation_loss": state.best_metric,
        "seconds": training_log.records()[-1]["seconds"],
        "tokens": int(state.num_input_tokens_seen),
        "trainable_parameters": trainable,
        "wandb_run_id": run_ids.get("wandb"),
        **({"tracking_runs": others} if others else {}),
    }


if __name__ == "__main__":
    start(train)
