"""The probe: two depths of the planned model, each trained for a few steps in a process of its own.

The base has the planned one's widths, a few blocks and random weights; what grows with the blocks grows evenly, so two
depths give the whole. `flows.resources.probe_process` is what runs in the processes, where the peak of memory is
their own.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy

from flows.errors import PlanError
from flows.resources.batches import BatchSize, RowSize, Workload, shapes
from flows.runtime.stage import set_seed

SHAPES = 40
"""Shapes of batches that are trained on, at most; the products of so many fill oneDNN's cache (1,024 kernels)."""
EVALUATED = 4
"""Shapes of batches that are evaluated, at most."""
Timings = list[tuple[int, float]]
"""(positions of a batch, its time in seconds), from small to large."""


@dataclass(frozen=True)
class Task:
    """What one process is to do."""

    params: dict[str, Any]
    base: str
    """Folder of the shallow base."""
    training: list[BatchSize]
    """Forward passes, in order."""
    evaluation: list[BatchSize]
    longest: int
    """Tokens of the run's longest row."""
    optimizer_steps: int
    """Of the whole run."""

    @classmethod
    def read(cls, path: Path) -> "Task":
        given = json.loads(path.read_text())
        for name in ("training", "evaluation"):
            given[name] = [BatchSize(tuple(RowSize(*row) for row in one["rows"]), one["padded"]) for one in given[name]]
        return cls(**given)


@dataclass(frozen=True)
class Measured:
    """What one process found, or what two say of a deeper model. Memory in bytes, time in seconds."""

    peak: float
    """At the worst of training's steps."""
    evaluation_peak: float
    """At the worst of an evaluation."""
    importing: float
    """From the start of the process until the libraries were there."""
    loading: float
    training: Timings
    """Forward and backward passes."""
    evaluation: Timings
    """Forward passes."""
    stepping: float
    """What an optimiser step takes beside its forward and backward passes."""
    saving: float
    """What a checkpoint takes."""

    @classmethod
    def read(cls, path: Path) -> "Measured":
        found = json.loads(path.read_text())
        pairs = {name: [(int(n), float(s)) for n, s in found[name]] for name in ("training", "evaluation")}
        return cls(**{**found, **pairs})

    def deeper(self, other: "Measured", depths: tuple[int, int], blocks: int) -> "Measured":
        """What this one and `other`, with these numbers of blocks, say of a model with `blocks`."""
        less, more = depths

        def size(one: float, two: float) -> float:
            return two + (blocks - more) * max(0.0, two - one) / (more - less)

        def time(one: float, two: float) -> float:
            # without any block it would still take some time, so a block takes no more than its share
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
    """How many blocks the two shallow models have; one of up to four is taken as it is.

    Far apart, because what one of them is off by is carried on. A single block is no measure: the output head then
    needs more than it, and the peak is elsewhere.
    """
    if blocks <= 4:
        return (blocks,)
    more = min(12, max(4, 2 * blocks // 5))
    return max(2, more // 4), more


def sequence(work: Workload) -> tuple[list[BatchSize], list[BatchSize]]:
    """(training's batches: the largest as a warm-up, one of each shape, the largest again; evaluation's batches).

    Each shape counts: on a CPU, oneDNN keeps the kernels that it compiled for the products of many shapes, and an
    allocator that is asked for many sizes wastes more.
    """
    largest = work.largest
    return [largest, *shapes(work.training, SHAPES), largest], shapes(work.evaluation, EVALUATED)


def seconds_of(batches: Sequence[BatchSize], timings: Timings) -> float:
    """Seconds for all batches, in between those that were timed; smaller ones in proportion to the smallest."""
    sizes, seconds = zip(*timings, strict=True)
    tokens = numpy.array([batch.tokens for batch in batches])
    return float(numpy.interp(tokens, [0, *sizes], [0.0, *seconds]).sum())


def run_probe(task: Task, scratch: Path, timeout: float) -> Measured:
    """Measure in a fresh process; PlanError, with the last thing that it said, if it fails or takes too long."""
    given, found = scratch / "task.json", scratch / "found.json"
    given.write_text(json.dumps(asdict(task)))
    command = [sys.executable, "-m", "flows.resources.probe_process", str(given), str(found)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise PlanError(
            f"the probe took longer than {timeout:g} seconds; allow more with --probe-timeout, or use --no-probe"
        ) from error
    if done.returncode == -9:
        raise PlanError("the system killed the probe, as it does where memory runs out; use --no-probe")
    if done.returncode:
        said = done.stderr.strip().splitlines()
        reason = said[-1].removeprefix("error: ") if said else f"exit status {done.returncode}"
        raise PlanError(f"the probe, a few steps of a shallow model, failed: {reason}")
    return Measured.read(found)


def write_shallow_base(config: Any, folder: Path, seed: int) -> None:
    """A model folder as the fetch stage leaves it, of this configuration and random weights."""
    import torch
    from transformers import AutoModelForCausalLM

    set_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
