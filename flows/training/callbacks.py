"""Trainer callbacks: evenly spread evaluations, early stopping, the training log, and progress bars."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback

from flows.runtime.machine_memory import peak_memory
from flows.runtime.progress import progress
from flows.training.log import Record, TrainingLog
from peftcore import PeftModel


def evenly_spread(total: int, count: int) -> list[int]:
    """Return `count` evenly spread steps of which the last is `total`; fewer if there are fewer steps."""
    return sorted({max(1, round(total * i / count)) for i in range(1, count + 1)})


def evaluations_since_best(history: Sequence[dict[str, Any]]) -> int:
    """Return the number of evaluations after the one with the lowest loss."""
    losses = [record["eval_loss"] for record in history if "eval_loss" in record]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


class EvaluateAt(TrainerCallback):
    """Evaluates and saves a checkpoint at the given steps."""

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps = frozenset(steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Request an evaluation and a checkpoint at the chosen steps."""
        if state.global_step in self.steps:
            control.should_evaluate = control.should_save = True


class StopWithoutGain(TrainerCallback):
    """Stops training after `patience` evaluations in a row without a new best.

    The callback reads the trainer's history, which is in each checkpoint, so it has no state of its own.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop training if the patience is used up."""
        if evaluations_since_best(state.log_history) >= self.patience:
            control.should_training_stop = True


class WriteLog(TrainerCallback):
    """Writes the training log, and passes each record to `mirror`.

    seconds: duration of the earlier parts of a resumed run.
    """

    def __init__(self, log: TrainingLog, mirror: Callable[[Record], None], seconds: float) -> None:
        self.log, self.mirror = log, mirror
        self.started = time.monotonic() - seconds
        self.step_started = self.stepping = 0.0
        self.tokens: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the ranks at the start."""
        self.write_ranks(state.global_step, kwargs.get("model"))

    def write_ranks(self, step: int, model: Any) -> None:
        """Write the ranks of the adapter's layers if there are ranks and they have changed."""
        ranks = model.adapter_ranks() if isinstance(model, PeftModel) else {}
        if self.log.append_ranks(step, ranks):
            self.mirror({"step": step, "mean_rank": sum(ranks.values()) / len(ranks)})

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock of a step."""
        if self.tokens is None:
            self.tokens = int(state.num_input_tokens_seen)
        self.step_started = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the time of a step; evaluations and checkpoints are not part of it."""
        self.stepping += time.monotonic() - self.step_started

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Append a record for a training log or an evaluation."""
        logs = logs or {}
        self.write_ranks(state.global_step, kwargs.get("model"))
        seconds = round(time.monotonic() - self.started, 3)
        common = {"step": state.global_step, "epoch": state.epoch, "seconds": seconds}
        if "eval_loss" in logs:
            self.mirror(self.log.append(**common, validation_loss=logs["eval_loss"], **_metrics(logs, "eval_")))
        elif "loss" in logs:
            tokens = int(state.num_input_tokens_seen) - (self.tokens or 0)
            record = self.log.append(
                **common,
                loss=logs["loss"],
                learning_rate=logs["learning_rate"],
                grad_norm=logs.get("grad_norm"),
                regularizer=logs.get("regularizer"),
                **_metrics(logs),
                tokens_per_second=round(tokens / self.stepping, 1) if self.stepping else None,
                peak_memory=peak_memory(args.device),
                loss_scale=logs.get("loss_scale"),
                **{name: logs.get(name, 0) for name in ("skipped_steps", "micro_batch_splits", "rollbacks")},
            )
            self.mirror(record)
            self.tokens, self.stepping = int(state.num_input_tokens_seen), 0.0


def _metrics(logs: dict[str, Any], prefix: str = "") -> dict[str, float | None]:
    """Return the metrics of an objective in a log; None for those of other objectives."""
    accuracy = logs.get(f"{prefix}rewards/accuracies", logs.get(f"{prefix}accuracy"))
    margin, divergence = logs.get(f"{prefix}rewards/margins"), logs.get(f"{prefix}divergence")
    margin = logs.get(f"{prefix}margin") if margin is None else margin  # TRL's name of it for reward models
    unended = logs.get(f"{prefix}completions/clipped_ratio")
    return {
        "accuracy": accuracy,
        "reward_margin": margin,
        "divergence": divergence,
        "reward": logs.get(f"{prefix}reward"),
        "reward_deviation": logs.get(f"{prefix}reward_std"),
        "equal_groups": logs.get(f"{prefix}frac_reward_zero_std"),
        "answer_tokens": logs.get(f"{prefix}completions/mean_length"),
        "eos_rate": None if unended is None else 1 - unended,
        "kl": None if unended is None else logs.get(f"{prefix}kl"),  # kto's is its reference point
    }


class ShowProgress(TrainerCallback):
    """Progress bars: steps, time left, speed, memory and last losses, with an inner bar for a running evaluation."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.evaluation: Any = None
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        self.bar = progress(state.max_steps, "train", start=state.global_step)
        self.tokens, self.since = int(state.num_input_tokens_seen), time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance the bar."""
        self.bar.update(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the last losses, speed and memory."""
        for name, key in (("loss", "loss"), ("validation", "eval_loss")):
            if logs and key in logs:
                self.shown[name] = f"{logs[key]:.3f}"
        if self.bar is None:
            return
        if logs and "loss" in logs:
            seconds, tokens = time.monotonic() - self.since, int(state.num_input_tokens_seen) - self.tokens
            self.shown |= {
                "tokens/s": f"{tokens / max(seconds, 1e-9):,.0f}",
                "peak": f"{peak_memory(args.device) / 2**30:.1f} GiB",
            }
        self.bar.set_postfix(self.shown, refresh=False)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Advance the bar of the evaluation."""
        if self.evaluation is None:
            self.evaluation = progress(len(eval_dataloader.dataset), "validation", unit="row")
        self.evaluation.update(min(args.eval_batch_size, self.evaluation.total - self.evaluation.n))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar of the evaluation."""
        if self.evaluation is not None:
            self.evaluation.close()
            self.evaluation = None
        self.tokens, self.since = int(state.num_input_tokens_seen), time.monotonic()  # without the evaluation

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self.bar.close()
