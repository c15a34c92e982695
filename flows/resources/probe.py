"""The probe: two depths of the model, each trained for a few steps.

The probe's base has the real widths, a few blocks and random weights. Memory and time grow linearly with the blocks, so
two depths give the whole. Batches of many shapes cost memory too (kernels that are cached by shape, and gaps in the
allocator's memory). These costs hardly grow with the blocks, so only the model with fewer blocks sees many shapes.
`flows.resources.probe_process` trains, in a process of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from flows.resources.batches import BatchSize, RowSize, Workload, shapes
from flows.runtime.stage import set_seed

TIMED = 3
"""Maximum shapes of batches that are timed."""
SHAPES = 40
"""Maximum shapes of batches that cost memory; their products fill oneDNN's cache (1,024 kernels)."""
SHAPES_ON_CPU = 8
"""Shapes to train on in place of all: on a CPU each costs the same, 20 MiB of kernels, so the rest is extrapolated. On
a GPU they cost gaps in the allocator's memory, which do not add up, and little time."""
Timings = list[tuple[int, float]]
"""(positions of a batch, seconds), from small to large."""


@dataclass(frozen=True)
class Task:
    """Work on one shallow model."""

    params: dict[str, Any]
    base: str
    """Folder of the shallow base."""
    timed: list[BatchSize]
    """Training batches to time, each one twice."""
    others: list[BatchSize]
    """Training batches of further shapes, whose memory alone is measured."""
    evaluation: list[BatchSize]
    """Batches to evaluate."""
    longest: int
    """Tokens of the run's longest row."""
    optimizer_steps: int
    """Optimiser steps of the whole run."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Task":
        """Return the task of these JSON values."""
        batches = {
            name: [BatchSize(tuple(RowSize(*row) for row in one["rows"]), one["padded"]) for one in values[name]]
            for name in ("timed", "others", "evaluation")
        }
        return cls(**{**values, **batches})


@dataclass(frozen=True)
class Measured:
    """Figures of one shallow model, or their extrapolation to a deeper model. Memory in bytes, time in seconds."""

    peak: float
    """Peak of training on the timed batches."""
    evaluation_peak: float
    """Peak of an evaluation, without `shapes`."""
    shapes: float
    """Memory that batches of further shapes add to each peak."""
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
    def of(cls, values: Mapping[str, Any]) -> "Measured":
        """Return the figures of these JSON values."""
        pairs = {name: [(int(n), float(s)) for n, s in values[name]] for name in ("training", "evaluation")}
        return cls(**{**values, **pairs})

    def deeper(self, other: "Measured", depths: tuple[int, int], blocks: int) -> "Measured":
        """Extrapolate these figures and those of `other` to a model with `blocks` blocks.

        Args:
            other: The figures of a model with more blocks.
            depths: The blocks of both models.
            blocks: The blocks of the whole model.
        """
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
            shapes=self.shapes,
            importing=max(self.importing, other.importing),
            loading=time(self.loading, other.loading),
            training=times(self.training, other.training),
            evaluation=times(self.evaluation, other.evaluation),
            stepping=time(self.stepping, other.stepping),
            saving=time(self.saving, other.saving),
        )


def depths(blocks: int) -> tuple[int, ...]:
    """Return the numbers of blocks of the shallow models; up to four blocks are measured directly.

    A single block would not do: the output head needs more memory than one block, so the peak is elsewhere.
    """
    return (blocks,) if blocks <= 4 else (2, min(6, blocks))


def batches(work: Workload, is_first: bool, most: int) -> dict[str, list[BatchSize]]:
    """Return the batches of a Task.

    Args:
        work: The batches of the run.
        is_first: The task is that of the model with fewest blocks.
        most: Maximum further shapes to train on.
    """
    timed = shapes(work.training, TIMED)
    others = shapes(tuple(further_shapes(work)), most) if is_first else []
    # the largest batch again: it needs more memory between other shapes than alone
    return {
        "timed": timed,
        "others": [*others, work.largest] if others else [],
        "evaluation": [work.largest_evaluation],
    }


def further_shapes(work: Workload) -> list[BatchSize]:
    """Return a training batch of each shape that costs memory and is not timed."""
    timed = shapes(work.training, TIMED)
    return [one for one in shapes(work.training, SHAPES) if one not in timed]


def seconds_of(batches: Sequence[BatchSize], timings: Timings) -> float:
    """Return the total seconds of batches, interpolated linearly between timed numbers of positions.

    Below the smallest timed number, the seconds are proportional to the positions. Above the largest timed number, the
    seconds of the largest apply.
    """
    sizes, seconds = zip(*timings, strict=True)
    tokens = numpy.array([batch.tokens for batch in batches])
    return float(numpy.interp(tokens, [0, *sizes], [0.0, *seconds]).sum())


def write_shallow_base(config: Any, folder: Path, seed: int) -> None:
    """Write a model folder with this configuration and random weights."""
    import torch
    from transformers import AutoModelForCausalLM

    set_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
