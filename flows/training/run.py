"""One training run: its identity, its length, and its resumable state."""

import hashlib
import json
import math
from collections.abc import Sized
from dataclasses import dataclass
from pathlib import Path

from transformers import TrainerState

from flows.params import Params
from flows.paths import Paths
from flows.training.log import TrainingLog
from peftcore.files import read_manifest, sha256
from peftcore.train import Packs


@dataclass(frozen=True)
class Run:
    """Folder and state of one run."""

    folder: Path
    """Folder of checkpoints and log."""
    checkpoint: Path | None
    """The last complete checkpoint; None at the start."""
    total_steps: int
    """Optimiser steps of the whole run."""

    @property
    def log(self) -> TrainingLog:
        """The run's training log."""
        return TrainingLog(self.folder / "log.jsonl")

    @property
    def state(self) -> TrainerState:
        """The trainer's state at the checkpoint."""
        if self.checkpoint is None:
            return TrainerState()
        return TrainerState.load_from_json(str(self.checkpoint / "trainer_state.json"))


def optimizer_steps(params: Params, training_set: Sized) -> int:
    """Return the optimiser steps of the run; as in Trainer, an epoch's last, smaller accumulation is a step.

    Processes run their forward passes in parallel, so a step takes fewer rounds.
    """
    if params.train.max_steps is not None:
        return params.train.max_steps
    at_once = 1 if isinstance(training_set, Packs) else params.train.batch_size
    if params.train.objective == "grpo" and (iterations := params.train.grpo.iterations) > 1:
        block = at_once * params.train.all_processes * params.train.gradient_accumulation
        return math.ceil(params.train.epochs * iterations * (len(training_set) // block))
    batches = math.ceil(math.ceil(len(training_set) / at_once) / params.train.all_processes)
    return math.ceil(params.train.epochs * math.ceil(batches / params.train.gradient_accumulation))


def run_key(params: Params, paths: Paths, base: str) -> str:
    """Return a digest of everything that determines a run, so that only a checkpoint of the same run is resumed."""
    sections = params.model_dump(include={"base", "method", "quantization", "train"})
    if params.data.special_tokens:
        sections["special_tokens"] = params.data.special_tokens
    data = [sha256(paths.split(name)) for name in ("train", "validation")]
    data += [sha256(paths.rewards)] if paths.rewards.exists() else []
    start = [read_manifest(at) for at in (paths.start_adapter, paths.teacher_adapter) if at.is_dir()]
    content = json.dumps([params.project.seed, sections, base, data, *start], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
