"""The probe: two depths of the model, each trained for a few steps in its own process.

The probe's base has the real widths, a few blocks and random weights. Memory and time grow linearly with the blocks, so
two depths give the whole. `flows.resources.probe_process` runs in the processes, which have their own memory peaks.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy

from flows.errors import EstimateError
from flows.resources.batches import BatchSize, RowSize, Workload, shapes
from flows.runtime.stage import set_seed

SHAPES = 40
"""Maximum shapes of batches to train on; their products fill oneDNN's cache (1,024 kernels)."""
EVALUATED = 4
"""Maximum shapes of batches to evaluate."""
Timings = list[tuple[int, float]]
"""(positions of a batch, seconds), from small to large."""


@dataclass(frozen=True)
class Task:
    """Work of one process."""

    params: dict[str, Any]
    base: str
    """Folder of the shallow base."""
    training: list[BatchSize]
    """Forward passes, in order."""
    evaluation: list[BatchSize]
    longest: int
    """Tokens of the run's longest row."""
    optimizer_steps: int
    """Optimiser steps of the whole run."""

    @classmethod
    def read(cls, path: Path) -> "Task":
        """Read a task file."""
        values = json.loads(path.read_text())
        for name in ("training", "evaluation"):
            values[name] = [
                BatchSize(tuple(RowSize(*row) for row in one["rows"]), one["padded"]) for one in values[name]
            ]
        return cls(**values)


@dataclass(frozen=True)
class Measured:
    """Results of one process, or their extrapolation to a deeper model. Memory in bytes, time in seconds."""

    peak: float
    """Peak of training."""
    evaluation_peak: float
    """Peak of an evaluation."""
    importing: float
    """Start of the process until libraries were imported."""
    loading: float
    training: Timings
    """Forward and backward passes."""
    evaluation: Timings
    """Forward passes."""
    stepping: float
    """An optimiser step without its passes."""
    saving: float
    """Writing a checkpoint."""

    @classmethod
    def read(cls, path: Path) -> "Measured":
        """Read a result file."""
        values = json.loads(path.read_text())
        pairs = {name: [(int(n), float(s)) for n, s in values[name]] for name in ("training", "evaluation")}
        return cls(**{**values, **pairs})

    def deeper(self, other: "Measured", depths: tuple[int, int], blocks: int) -> "Measured":
        """Extrapolate this result and `other`, with `depths` blocks, to a model with `blocks` blocks."""
        less, more = depths

        def size(one: float, two: float) -> float:
            return two + (blocks - more) * max(0.0, two - one) / (more - less)

        def time(one: float, two: float) -> float:
            # a model without blocks still takes time, so a block takes at most its share
            return two + (blocks - more) * min(max(0.0, two - one) / (more - less), two / more)

        def times(one: Timings, two: Timings) -> Timings:
            return [(tokens, time(s, t)) for (tokens, s), (_, t) in zip(one, two, strict=True)]

        return Measured(
            peak=size(self.peak, other.peak),
            evaluation_peak=size(self.evaluation_peak, other.evaluation_peak),
            importing=max(self.importing, other.importing),
            loading=time(self.loading, other.loading),
            training=times(self.training, other.training),
            evaluation=times(self.evaluation, other.evaluation),
            stepping=time(self.stepping, other.stepping),
            saving=time(self.saving, other.saving),
        )


def depths(blocks: int) -> tuple[int, ...]:
    """Return the numbers of blocks of the shallow models; up to four blocks are measured directly.

    The depths are far apart, because extrapolation multiplies errors. A single block would not do: the output head
    needs more memory than one block, so the peak is elsewhere.
    """
    if blocks <= 4:
        return (blocks,)
    more = min(12, max(4, 2 * blocks // 5))
    return max(2, more // 4), more


def sequence(work: Workload) -> tuple[list[BatchSize], list[BatchSize]]:
    """Return training batches (the largest as warm-up, one of each shape, the largest again) and evaluation batches.

    Every shape counts: oneDNN caches kernels by shape on a CPU, and an allocator wastes more with many sizes.
    """
    largest = work.largest
    return [largest, *shapes(work.training, SHAPES), largest], shapes(work.evaluation, EVALUATED)


def seconds_of(batches: Sequence[BatchSize], timings: Timings) -> float:
    """Return the total seconds of batches, interpolated linearly between timed numbers of positions.

    Below the smallest timed number, the seconds are proportional to the positions. Above the largest timed number, the
    seconds of the largest apply.
    """
    sizes, seconds = zip(*timings, strict=True)
    tokens = numpy.array([batch.tokens for batch in batches])
    return float(numpy.interp(tokens, [0, *sizes], [0.0, *seconds]).sum())


def run_probe(task: Task, scratch: Path, timeout: float) -> Measured:
    """Measure in a new process.

    Raises:
        EstimateError: With the process's last message, if it fails or exceeds `timeout` seconds.
    """
    task_file, result_file = scratch / "task.json", scratch / "result.json"
    task_file.write_text(json.dumps(asdict(task)))
    command = [sys.executable, "-m", "flows.resources.probe_process", str(task_file), str(result_file)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise EstimateError(
            f"the probe took longer than {timeout:g} seconds; allow more with --probe-timeout, or use --no-probe"
        ) from error
    if done.returncode == -9:
        raise EstimateError("the system killed the probe, probably for lack of memory; use --no-probe")
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        reason = lines[-1].removeprefix("error: ") if lines else f"exit status {done.returncode}"
        raise EstimateError(f"the probe, a few steps of a shallow model, failed: {reason}")
    return Measured.read(result_file)


def write_shallow_base(config: Any, folder: Path, seed: int) -> None:
    """Write a model folder with this configuration and random weights."""
    import torch
    from transformers import AutoModelForCausalLM

    set_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
