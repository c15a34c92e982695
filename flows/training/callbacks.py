"""What happens around training's steps: evaluations at even distances, early stopping, the log and the bars."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback

from flows.runtime.machine_memory import peak_memory
from flows.runtime.progress import progress
from flows.training.log import Record, TrainingLog
from peftcore import PeftModel


def evenly_spread(total: int, count: int) -> list[int]:
    """`count` steps at even distances of which the last is `total`; fewer if there are fewer steps."""
    return sorted({max(1, round(total * i / count)) for i in range(1, count + 1)})


def evaluations_since_best(history: Sequence[dict[str, Any]]) -> int:
    """How many evaluations of a trainer's history came after the one with the lowest loss."""
    losses = [record["eval_loss"] for record in history if "eval_loss" in record]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


class EvaluateAt(TrainerCallback):
    """Evaluates and saves a checkpoint at given steps."""

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps = frozenset(steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            control.should_evaluate = control.should_save = True


class StopWithoutGain(TrainerCallback):
    """Ends training after `patience` evaluations in a row without a new best.

    It reads the trainer's history, which is part of each checkpoint, so it needs no state of its own.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if evaluations_since_best(state.log_history) >= self.patience:
            control.should_training_stop = True


class WriteLog(TrainerCallback):
    """Writes the training log, and hands each record on."""

    def __init__(self, log: TrainingLog, mirror: Callable[[Record], None], seconds: float) -> None:
        """seconds: what earlier parts of the run took."""
        self.log, self.mirror = log, mirror
        self.started = time.monotonic() - seconds
        self.step_started = self.stepping = 0.0
        self.tokens: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.write_ranks(state.global_step, kwargs.get("model"))

    def write_ranks(self, step: int, model: Any) -> None:
        """Write the ranks of the adapter's layers, where it has some and they have changed."""
        ranks = model.adapter_ranks() if isinstance(model, PeftModel) else {}
        if self.log.append_ranks(step, ranks):
            self.mirror({"step": step, "mean_rank": sum(ranks.values()) / len(ranks)})

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.tokens is None:
            self.tokens = int(state.num_input_tokens_seen)
        self.step_started = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stepping += time.monotonic() - self.step_started  # evaluations and checkpoints are not in it

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        self.write_ranks(state.global_step, kwargs.get("model"))
        seconds = round(time.monotonic() - self.started, 3)
        common = {"step": state.global_step, "epoch": state.epoch, "seconds": seconds}
        if "eval_loss" in logs:
            self.mirror(self.log.append(**common, validation_loss=logs["eval_loss"], **_judged(logs, "eval_")))
        elif "loss" in logs:
            tokens = int(state.num_input_tokens_seen) - (self.tokens or 0)
            record = self.log.append(
                **common,
                loss=logs["loss"],
                learning_rate=logs["learning_rate"],
                grad_norm=logs.get("grad_norm"),
                regularizer=logs.get("regularizer"),
                **_judged(logs),
                tokens_per_second=round(tokens / self.stepping, 1) if self.stepping else None,
                peak_memory=peak_memory(args.device),
                loss_scale=logs.get("loss_scale"),
                **{name: logs.get(name, 0) for name in ("skipped_steps", "micro_batch_splits", "rollbacks")},
            )
            self.mirror(record)
            self.tokens, self.stepping = int(state.num_input_tokens_seen), 0.0


def _judged(logs: dict[str, Any], prefix: str = "") -> dict[str, float | None]:
    """What objectives of pairs and of classes say beside their loss."""
    accuracy = logs.get(f"{prefix}rewards/accuracies", logs.get(f"{prefix}accuracy"))
    return {"accuracy": accuracy, "reward_margin": logs.get(f"{prefix}rewards/margins")}


class ShowProgress(TrainerCallback):
    """The bars: steps done, time left, speed, memory, the last losses; inside it, batches of a running evaluation."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.evaluation: Any = None
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = progress(state.max_steps, "train", start=state.global_step)
        self.tokens, self.since = int(state.num_input_tokens_seen), time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
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
        if self.evaluation is None:
            self.evaluation = progress(len(eval_dataloader.dataset), "validation", unit="row")
        self.evaluation.update(min(args.eval_batch_size, self.evaluation.total - self.evaluation.n))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.evaluation is not None:
            self.evaluation.close()
            self.evaluation = None
        self.tokens, self.since = int(state.num_input_tokens_seen), time.monotonic()  # an evaluation is no training

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()
