"""Forward passes of a run by shape: batches are known before training."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from flows.data.rows import read_rows
from flows.errors import EstimateError
from flows.params import Params
from flows.paths import Paths, Split, prepare_command
from flows.training.run import optimizer_steps
from peftcore import TrainingError
from peftcore.train import LengthGroupedSampler, Packs, supervised_positions

MULTIPLE = 8
"""RightPaddingCollator rounds a batch's width up to a multiple of this (tokens)."""


class RowSize(NamedTuple):
    """One row: number of tokens, and number of supervised tokens."""

    tokens: int
    supervised: int


@dataclass(frozen=True)
class BatchSize:
    """Rows of one forward pass."""

    rows: tuple[RowSize, ...]
    padded: bool
    """True: each row is padded to the longest; False: rows are concatenated."""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, width) of the tensor of token ids."""
        if not self.padded:
            return 1, sum(row.tokens for row in self.rows)
        return len(self.rows), -(-max(row.tokens for row in self.rows) // MULTIPLE) * MULTIPLE

    @property
    def tokens(self) -> int:
        """Number of computed token positions, padding included."""
        rows, width = self.shape
        return rows * width

    @property
    def supervised(self) -> int:
        """Supervised tokens."""
        return sum(row.supervised for row in self.rows)


@dataclass(frozen=True)
class Workload:
    """Forward passes and steps of a run."""

    training: tuple[BatchSize, ...]
    """Forward passes of one epoch."""
    evaluation: tuple[BatchSize, ...]
    """Forward passes of one evaluation."""
    optimizer_steps: int
    forward_passes: int
    """Training forward passes of all optimiser steps."""
    longest: int
    """Tokens of the longest row."""
    prepared: bool
    """True: sizes of prepared rows; False: every row is assumed to have the maximum length."""

    @property
    def largest(self) -> BatchSize:
        """The training batch that needs most memory."""
        return max(self.training, key=_size)

    @property
    def largest_evaluation(self) -> BatchSize:
        """The evaluation batch that needs most memory."""
        return max(self.evaluation, key=_size)


def _size(batch: BatchSize) -> tuple[int, int, int]:
    return batch.tokens, batch.shape[1], batch.supervised


def workload(params: Params, paths: Paths) -> Workload:
    """Return the batches of a run on the prepared rows, or on rows of maximum length without prepared rows.

    Raises:
        EstimateError: The number of rows is unknown.
    """
    prepared = paths.split("train").exists() and paths.split("validation").exists()
    train = _prepared(paths, "train") if prepared else _assumed(params, paths, params.data.train_rows, "train_rows")
    checked = (
        _prepared(paths, "validation") if prepared else _assumed(params, paths, params.data.validation_rows or 1, "")
    )
    batches, steps = _training(params, train)
    at_once = 2 * params.train.batch_size
    evaluation = [BatchSize(tuple(checked[i : i + at_once]), True) for i in range(0, len(checked), at_once)]
    return Workload(
        training=tuple(batches),
        evaluation=tuple(evaluation),
        optimizer_steps=steps,
        forward_passes=min(
            steps * params.train.gradient_accumulation, math.ceil(steps / _steps_of(params, batches)) * len(batches)
        ),
        longest=max(row.tokens for row in (*train, *checked)),
        prepared=prepared,
    )


def _steps_of(params: Params, batches: list[BatchSize]) -> int:
    """Return the optimiser steps of an epoch."""
    return math.ceil(len(batches) / params.train.gradient_accumulation)


def _prepared(paths: Paths, split: Split) -> list[RowSize]:
    rows = read_rows(paths.split(split), ["input_ids", "labels"])
    return [
        RowSize(len(row["input_ids"]), int(supervised_positions(torch.tensor([row["labels"]])).sum())) for row in rows
    ]


def _assumed(params: Params, paths: Paths, count: int | None, key: str) -> list[RowSize]:
    if count is None:
        raise EstimateError(
            f"data.{key} is null and no rows are prepared; run `{prepare_command(paths.root)}`, or give a number"
        )
    return [RowSize(params.data.max_length, params.data.max_length - 1)] * count


def _training(params: Params, rows: list[RowSize]) -> tuple[list[BatchSize], int]:
    """Return (batches of an epoch, optimiser steps of the run)."""
    train, seed = params.train, params.project.seed
    if train.batching == "packed":
        try:
            packs = Packs([{"input_ids": range(row.tokens)} for row in rows], train.pack_tokens)
        except TrainingError as error:
            raise EstimateError(f"train.pack_tokens is {train.pack_tokens}: {error}") from error
        chosen = [tuple(rows[i] for i in pack) for pack in packs.sampler(seed)]
        return [BatchSize(pack, False) for pack in chosen], optimizer_steps(params, packs)
    if train.batching == "grouped":
        order = list(LengthGroupedSampler([row.tokens for row in rows], train.batch_size, seed))
    else:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    chunks = [order[i : i + train.batch_size] for i in range(0, len(order), train.batch_size)]
    padded = train.batching != "padding_free"
    return [BatchSize(tuple(rows[i] for i in chunk), padded) for chunk in chunks], optimizer_steps(params, rows)


def shapes(batches: tuple[BatchSize, ...], most: int) -> list[BatchSize]:
    """Return one batch per shape, in their order; if there are more than `most`, an even selection with the largest."""
    distinct = sorted({batch.shape: batch for batch in sorted(batches, key=_size)}.values(), key=_size)
    if len(distinct) > most:
        distinct = [distinct[round(i * (len(distinct) - 1) / (most - 1))] for i in range(most)]
    return sorted(distinct, key=batches.index)
