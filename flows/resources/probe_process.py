"""One process of the probe, with the train stage's storage, adapter, attention, recomputation, optimiser and trainer.

python -m flows.resources.probe_process TASK.json RESULT.json
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy
import psutil
import torch
from scipy.optimize import nnls
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

import flows.stages.train  # noqa: F401 - what the real process holds of libraries, this one holds too
from flows.base.model import device, load_for_training
from flows.errors import PipelineError
from flows.params import Params
from flows.resources.batches import BatchSize
from flows.resources.probe import Measured, Task, Timings
from flows.resources.sizes import without_start
from flows.runtime.machine_memory import forget_peak, peak_memory
from flows.runtime.processes import watch_parent
from flows.runtime.stage import fail, set_seed
from flows.training.adapter_choice import adapter_config
from peftcore import get_peft_model
from peftcore.errors import PeftError
from peftcore.train import AdapterTrainer, PackedCollator, RightPaddingCollator, recompute_activations

Collate = Callable[..., dict[str, Any]]
OUTLYING = 1.25
"""Ratio to the fitted duration from which a pass counts as disturbed by other load."""


class TimedTrainer(AdapterTrainer):
    """Trainer on a list of whole batches that records the duration of each forward and backward."""

    pass_seconds: list[float]

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run AdapterTrainer's step and record its duration."""
        loss: list[Any] = []
        self.pass_seconds.append(
            _seconds(lambda: loss.append(super(TimedTrainer, self).training_step(*args, **kwargs)))
        )
        return loss[0]


class TimeSteps(TrainerCallback):
    """Records the duration of optimiser steps without their passes."""

    def __init__(self, passes: list[float]) -> None:
        self.passes, self.seconds = passes, [0.0]
        self.started, self.before = 0.0, 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.started, self.before = time.perf_counter(), len(self.passes)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record a step."""
        self.seconds.append(time.perf_counter() - self.started - sum(self.passes[self.before :]))


class WholeBatch:
    """Collator for a data set whose items are batches."""

    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, items: Sequence[Any]) -> dict[str, Any]:
        """Collate the only item, a batch."""
        return self.collate(items[0])


def main() -> None:
    """Run the task; an error becomes one `error: ...` message and exit status 1."""
    imported = time.time() - psutil.Process(os.getpid()).create_time()
    watch_parent()
    try:
        result = measure(Task.read(Path(sys.argv[1])), imported)
    except (PeftError, PipelineError) as error:
        fail(str(error))
    Path(sys.argv[2]).write_text(json.dumps(asdict(result)))


def measure(task: Task, imported: float) -> Measured:
    """Load, train, evaluate and save; imported: seconds until libraries were imported."""
    params, place = Params.model_validate(task.params), device()
    if params.tracking.mode != "disabled" and "wandb" in params.tracking.backends:
        import wandb  # noqa: F401
    set_seed(params.project.seed)
    started = time.perf_counter()
    base: Any = load_for_training(Path(task.base), params.quantization.uncalibrated, task.longest)
    loading = time.perf_counter() - started
    model = get_peft_model(base, without_start(adapter_config(params, task.optimizer_steps)))
    recompute_activations(model, params.train.gradient_checkpointing)
    trainer = _trainer(params, model, task, Path(task.base).parent / "run")
    steps = TimeSteps(trainer.pass_seconds)
    trainer.add_callback(steps)
    forget_peak(place)
    trainer.train()
    peak = peak_memory(place)
    trainer.data_collator = WholeBatch(RightPaddingCollator(0))
    batches = [_items(batch) for batch in task.evaluation]
    forget_peak(place)
    times = [min(_seconds(lambda one=batch: trainer.evaluate([one])) for _ in range(2)) for batch in batches]  # type: ignore
    evaluation_peak = peak_memory(place)
    return Measured(
        peak=peak,
        evaluation_peak=evaluation_peak,
        importing=imported,
        loading=loading,
        training=_smoothed(task.training[1:], trainer.pass_seconds[1:]),
        evaluation=_smoothed(task.evaluation, times),
        stepping=sorted(steps.seconds)[len(steps.seconds) // 2],
        saving=_seconds(lambda: trainer._save_checkpoint(model, None)),
    )


def _trainer(params: Params, model: Any, task: Task, folder: Path) -> TimedTrainer:
    from flows.training.arguments import training_arguments

    accumulation = min(2, params.train.gradient_accumulation)
    arguments = training_arguments(params, folder, -(-len(task.training) // accumulation))
    arguments.per_device_train_batch_size = arguments.per_device_eval_batch_size = 1  # an item is a whole batch
    arguments.gradient_accumulation_steps = accumulation
    arguments.train_sampling_strategy = "sequential"
    arguments.eval_strategy, arguments.save_strategy = IntervalStrategy.NO, SaveStrategy.NO
    arguments.load_best_model_at_end = False
    packed = params.train.batching in ("padding_free", "packed")
    trainer = TimedTrainer(
        model=model,
        args=arguments,
        train_dataset=[_items(batch) for batch in task.training],  # type: ignore[arg-type]
        data_collator=WholeBatch(PackedCollator() if packed else RightPaddingCollator(0)),
    )
    trainer.pass_seconds = []
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    return trainer


def _items(batch: BatchSize) -> list[dict[str, list[int]]]:
    """Return rows of these sizes; their tokens are among the first of any vocabulary."""
    items = []
    for row in batch.rows:
        ids = [3 + position % 50 for position in range(row.tokens)]
        hidden = row.tokens - row.supervised
        items.append({"input_ids": ids, "labels": [-100] * hidden + ids[hidden:]})
    return items


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _smoothed(batches: Sequence[BatchSize], seconds: Sequence[float]) -> Timings:
    """Fit durations by a constant per pass, a term per position, and a term per pair of positions in a row.

    A single measurement is noisy, and extrapolation would multiply the noise. Other load only adds time, so passes that
    took much longer than the fit are left out of a second fit.
    """
    sizes = numpy.array([(1.0, batch.tokens, batch.tokens * batch.shape[1]) for batch in batches])
    sizes /= sizes.max(0)
    taken = numpy.array(seconds)

    def fit(usual: numpy.ndarray) -> numpy.ndarray:
        # weighted by relative errors
        coefficients, _residual = nnls(sizes[usual] / taken[usual, None], numpy.ones(int(usual.sum())))
        return sizes @ coefficients

    fitted = fit(taken < OUTLYING * fit(taken > 0))
    return sorted({batch.tokens: float(time) for batch, time in zip(batches, fitted, strict=True)}.items())


if __name__ == "__main__":
    main()
