"""The probe's process, with the train stage's storage, adapter, attention, recomputation, optimiser and trainer.

It imports its libraries, then reads {"tasks": [...], "out": file to write} from stdin. On Linux without a GPU each task
has a forked process, which has its own memory peak and no import of its own. Elsewhere the tasks share this process:
CUDA does not survive a fork, and its allocator's peak can be reset.
"""

import gc
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
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


class TimedTrainer(AdapterTrainer):
    """Trainer on a list of whole batches that records the duration of each forward and backward, and the peak after."""

    pass_seconds: list[float]
    peaks: list[int]

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run AdapterTrainer's step and record its duration and the memory peak so far (bytes)."""
        loss: list[Any] = []
        self.pass_seconds.append(
            _seconds(lambda: loss.append(super(TimedTrainer, self).training_step(*args, **kwargs)))
        )
        self.peaks.append(peak_memory(device()))
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
    """Run the tasks of stdin; an error becomes one `error: ...` message and exit status 1."""
    imported = time.time() - psutil.Process(os.getpid()).create_time()
    watch_parent()
    request = json.loads(sys.stdin.read())
    run = _forked if sys.platform == "linux" and device().type == "cpu" else _here
    measured = [asdict(run(Task.of(values), imported)) for values in request["tasks"]]
    Path(request["out"]).write_text(json.dumps(measured), encoding="utf-8")


def _here(task: Task, imported: float) -> Measured:
    try:
        return measure(task, imported)
    except (PeftError, PipelineError) as error:
        fail(str(error))
    finally:
        gc.collect()  # the next task's model comes into the memory of this one
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _forked(task: Task, imported: float) -> Measured:
    """Return the figures of a task that a forked process measures; exits with its status if it fails."""
    with TemporaryDirectory(prefix="peftcore-probe-") as folder:
        out = Path(folder) / "measured.json"
        process = multiprocessing.get_context("fork").Process(target=_write, args=(task, imported, out))
        process.start()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            os.kill(os.getpid(), signal.SIGKILL)  # the parent explains it: probably memory is short
        if process.exitcode:
            sys.exit(1)
        return Measured.of(json.loads(out.read_text(encoding="utf-8")))


def _write(task: Task, imported: float, out: Path) -> None:
    watch_parent()
    out.write_text(json.dumps(asdict(_here(task, imported))), encoding="utf-8")


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
    peak, with_other_shapes = trainer.peaks[2 * len(task.timed) - 1], trainer.peaks[-1]
    trainer.data_collator = WholeBatch(RightPaddingCollator(0))
    batches = [_items(batch) for batch in task.evaluation]
    forget_peak(place)
    times = [_seconds(lambda one=batch: trainer.evaluate([one])) for batch in batches]  # type: ignore[arg-type]
    passes = zip(trainer.pass_seconds, trainer.pass_seconds[len(task.timed) :], strict=False)
    return Measured(
        peak=peak,
        evaluation_peak=peak_memory(place) - (with_other_shapes - peak),
        shapes=with_other_shapes - peak,
        importing=imported,
        loading=loading,
        training=_by_size(task.timed, [min(twice) for twice in passes]),
        evaluation=_by_size(task.evaluation, times),
        stepping=sorted(steps.seconds)[len(steps.seconds) // 2],
        saving=_seconds(lambda: trainer._save_checkpoint(model, None)),
    )


def _trainer(params: Params, model: Any, task: Task, folder: Path) -> TimedTrainer:
    from flows.training.arguments import training_arguments

    batches, accumulation = [*task.timed, *task.timed, *task.others], min(2, params.train.gradient_accumulation)
    arguments = training_arguments(params, folder, -(-len(batches) // accumulation))
    arguments.per_device_train_batch_size = arguments.per_device_eval_batch_size = 1  # an item is a whole batch
    arguments.gradient_accumulation_steps = accumulation
    arguments.train_sampling_strategy = "sequential"
    arguments.eval_strategy, arguments.save_strategy = IntervalStrategy.NO, SaveStrategy.NO
    arguments.load_best_model_at_end = False
    packed = params.train.batching in ("padding_free", "packed")
    trainer = TimedTrainer(
        model=model,
        args=arguments,
        train_dataset=[_items(batch) for batch in batches],  # type: ignore[arg-type]
        data_collator=WholeBatch(PackedCollator() if packed else RightPaddingCollator(0)),
    )
    trainer.pass_seconds, trainer.peaks = [], []
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


def _by_size(batches: Sequence[BatchSize], seconds: Sequence[float]) -> Timings:
    """Return the durations by the batches' positions, the shorter one of two batches with as many positions."""
    shortest: dict[int, float] = {}
    for batch, taken in zip(batches, seconds, strict=False):
        shortest[batch.tokens] = min(taken, shortest.get(batch.tokens, taken))
    return sorted(shortest.items())


if __name__ == "__main__":
    main()
