"""Evaluation by rows: metrics are means over the whole set, not over its batches, and no logits are kept."""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput

from peftcore.errors import TrainingError


def evaluate_rows(trainer: Any, dataloader: Any, metric_key_prefix: str) -> EvalLoopOutput | None:
    """Return the metrics of an evaluation set by the trainer's objective.

    Args:
        trainer: An `AdapterTrainerMixin`.
        dataloader: Batches of the evaluation set.
        metric_key_prefix: Prefix of the metrics' names, such as `eval`.

    Returns:
        Metrics and number of rows, or None if Trainer's own evaluation loop must be used: the loss is not a sum over
        items, or the model is sharded by DeepSpeed or FSDP1.

    Raises:
        TrainingError: The loss is not finite, or nothing in the set is supervised.
    """
    objective = trainer.training_objective
    managed = trainer.is_deepspeed_enabled or (trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2)
    if managed or not objective.is_sum_over_items():
        return None
    model = trainer._wrap_model(cast(nn.Module, trainer.model), training=False)
    if not trainer.accelerator._models and model is trainer.model:  # evaluated without having been trained
        model = trainer.accelerator.prepare_model(model, evaluation_mode=True)
    model.eval()
    trainer.callback_handler.eval_dataloader = dataloader
    batches: list[dict[str, Tensor]] = []
    with torch.random.fork_rng(devices=[]):  # a data loader draws a random number, so dropout would change
        for inputs in dataloader:
            with trainer.compute_loss_context_manager():
                if not objective.evaluates_rows(model, dict(trainer._prepare_inputs(inputs))):
                    return None
            rows = row_metrics(trainer, model, inputs)
            gathered = cast(dict[str, Tensor], trainer.accelerator.gather_for_metrics(rows))
            batches.append({name: values.cpu() for name, values in gathered.items()})
            trainer.control = trainer.callback_handler.on_prediction_step(trainer.args, trainer.state, trainer.control)
    metrics = objective.set_metrics(batches)
    if not math.isfinite(metrics["loss"]):
        raise TrainingError(
            f"the evaluation loss is {metrics['loss']}: the adapter's weights or activations have overflowed; lower "
            "the learning rate, or compute in float32"
        )
    return EvalLoopOutput(
        predictions=None,  # type: ignore[arg-type]
        label_ids=None,
        metrics={f"{metric_key_prefix}_{name}": value for name, value in metrics.items()},
        num_samples=sum(len(batch["loss"]) for batch in batches),
    )


@torch.no_grad()
def row_metrics(trainer: Any, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Return the objective's metrics of each row of a batch, (B,)."""
    prepared = dict(trainer._prepare_inputs(inputs))
    with trainer.compute_loss_context_manager():
        return trainer.training_objective.row_metrics(model, prepared)


@contextmanager
def random_states_preserved() -> Iterator[None]:
    """Restore the random states of Python, NumPy and PyTorch on exit."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
