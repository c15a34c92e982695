"""Paths that the pipeline reads and writes, relative to the root of the repository."""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
CORRECTED_STORAGE = "corrected_storage.json"
"""File of an adapter's folder with the storage whose losses the adapter corrects."""


@dataclass(frozen=True)
class Paths:
    """Every file and folder of a run; nothing is created on access."""

    root: Path

    @property
    def params(self) -> Path:
        """Parameters of the run."""
        return self.root / "params.yaml"

    @property
    def artifacts(self) -> Path:
        """Folder of all stages' outputs."""
        return self.root / "artifacts"

    @property
    def base(self) -> Path:
        """The base model: a transformers folder with its tokenizer, and SHA256SUMS."""
        return self.artifacts / "base"

    @property
    def data(self) -> Path:
        """Folder of the tokenised splits and their report."""
        return self.artifacts / "data"

    def split(self, name: Split) -> Path:
        """Return the file of one split."""
        return self.data / f"{name}.parquet"

    @property
    def data_report(self) -> Path:
        """Report on the splits."""
        return self.data / "report.json"

    @property
    def labels(self) -> Path:
        """Names of the classes or tags by index, for classification and token_classification."""
        return self.data / "labels.json"

    @property
    def rewards(self) -> Path:
        """Functions, options and files of the rewards, for grpo."""
        return self.data / "rewards.json"

    @property
    def architecture(self) -> Path:
        """Architecture of the base."""
        return self.artifacts / "architecture.json"

    @property
    def adapter(self) -> Path:
        """The trained adapter, in PEFT's format."""
        return self.artifacts / "adapter"

    @property
    def start(self) -> Path:
        """Folder of the version that training continues from."""
        return self.artifacts / "start"

    @property
    def start_source(self) -> Path:
        """File with the version that training continues from, or null."""
        return self.start / "source.json"

    @property
    def start_learned(self) -> Path:
        """Question and answer of the rows on which the version in `start` was trained or validated; may be absent."""
        return self.start / "learned.parquet"

    @property
    def start_adapter(self) -> Path:
        """Adapter of the version that training continues from; absent if training starts anew."""
        return self.start / "adapter"

    @property
    def start_calibrated(self) -> Path:
        """Calibrated base of the version that training continues from; absent if it was trained without calibration."""
        return self.start / "calibrated"

    @property
    def calibrated(self) -> Path:
        """The calibrated base: a quantised transformers folder and its record, or the record alone (no calibration)."""
        return self.artifacts / "calibrated"

    @property
    def teacher_source(self) -> Path:
        """File with the version that is the teacher (distillation); absent if no version is."""
        return self.start / "teacher.json"

    @property
    def teacher_adapter(self) -> Path:
        """Adapter of the version that is the teacher."""
        return self.start / "teacher"

    @property
    def training(self) -> Path:
        """Folder of the training run's log, loss curves and summary."""
        return self.artifacts / "training"

    @property
    def training_log(self) -> Path:
        """Training log."""
        return self.training / "log.jsonl"

    @property
    def loss_curve(self) -> Path:
        """Loss curves as CSV."""
        return self.training / "loss.csv"

    @property
    def training_summary(self) -> Path:
        """Summary of the training run."""
        return self.training / "summary.json"

    @property
    def evaluation(self) -> Path:
        """Folder of the evaluation's results."""
        return self.artifacts / "evaluation"

    @property
    def evaluation_rows(self) -> Path:
        """Losses and answers by test row."""
        return self.evaluation / "rows.parquet"

    @property
    def evaluation_control(self) -> Path:
        """Losses on the control set; absent if not measured."""
        return self.evaluation / "control.parquet"

    @property
    def evaluation_metrics(self) -> Path:
        """Metrics of the evaluation."""
        return self.evaluation / "metrics.json"

    @property
    def evaluation_suites(self) -> Path:
        """Answers to the prompt suites, with the failed assertions; absent without suites."""
        return self.evaluation / "suites.json"

    @property
    def samples(self) -> Path:
        """Answers of both models side by side."""
        return self.evaluation / "samples.json"

    @property
    def merged(self) -> Path:
        """The adapter merged into the base: a transformers folder, and SHA256SUMS."""
        return self.artifacts / "merged"

    @property
    def merge_report(self) -> Path:
        """Report on the merge."""
        return self.artifacts / "merge.json"

    @property
    def version(self) -> Path:
        """Record of the version that the run registers."""
        return self.artifacts / "version.json"

    @property
    def metrics(self) -> Path:
        """Headline metrics of the run; the only output that git tracks."""
        return self.root / "metrics.json"

    @property
    def review(self) -> Path:
        """Review page."""
        return self.root / "reports" / "review.html"

    @property
    def retraining(self) -> Path:
        """Folder for retraining: history, pages, schedule, and lists of excluded, trusted and tried files."""
        return self.review.with_name("retraining")

    @property
    def retraining_history(self) -> Path:
        """History of retrainings."""
        return self.retraining / "history.jsonl"

    @property
    def retraining_page(self) -> Path:
        """Page of the retrainings."""
        return self.retraining / "index.html"

    @property
    def excluded(self) -> Path:
        """List of the files of rows that retrainings leave out."""
        return self.retraining / "set_aside.json"

    @property
    def tried(self) -> Path:
        """Sets of files of rows on which an earlier retraining made a candidate that was judged."""
        return self.retraining / "tried.json"

    @property
    def trusted(self) -> Path:
        """List of the files of rows that a person trusts although they exceeded a drift limit."""
        return self.retraining / "vouched.json"

    @property
    def schedule(self) -> Path:
        """Times of the next retrainings, while `peftcore schedule` runs."""
        return self.retraining / "schedule.json"

    @property
    def promotion(self) -> Path:
        """Outcome of the last promotion, for the review page."""
        return self.review.with_name("promotion.json")

    @property
    def trials(self) -> Path:
        """Parameters that sweeps and trials of this clone have tried, by the digest of the prepared data."""
        return self.review.with_name("trials.json")

    @property
    def benchmark_cache(self) -> Path:
        """Cached figures of benchmarks, by the digests of model and task; not an output of DVC."""
        return self.checkpoints / "benchmarks"

    @property
    def judge_cache(self) -> Path:
        """Cached verdicts of the judge, by the digest of judge, prompt and answers; not an output of DVC."""
        return self.checkpoints / "judge"

    @property
    def judgement(self) -> Path:
        """Answers and verdicts of the last comparison by the judge, for the review page."""
        return self.review.with_name("judge.json")

    @property
    def checkpoints(self) -> Path:
        """Resumable state of training; not an output of DVC, because DVC deletes outputs before a stage starts."""
        return self.root / "checkpoints"


def prepare_command(root: Path) -> str:
    """Return the command that runs the stage prepare and those before it, as the user's folder needs it."""
    return f"dvc repro {stage_from_here(root, 'prepare')}"


def stage_from_here(root: Path, stage: str) -> str:
    """Return a stage's address, as a command of DVC in the user's folder needs it."""
    pipeline = from_here(root, "dvc.yaml")
    return stage if pipeline == "dvc.yaml" else f"{pipeline}:{stage}"


def from_here(root: Path, name: str) -> str:
    """Return the path of a file or folder of the repository, as a command in the user's folder needs it.

    A user who is neither in `root` nor above it has to go there first, so the path is that from `root`.
    """
    here, root = Path.cwd(), root.resolve()
    is_near = here.is_relative_to(root) or root.is_relative_to(here)
    return shlex.quote(os.path.relpath(root / name, here) if is_near else name)
