"""Evaluation of a reward model on preference pairs: loss, accuracy, and margins of the rewards.

The base has no head for rewards. So the adapter is compared with equal rewards for all answers: their margins are 0,
their accuracy is 0.5 (a tie counts half), and their loss without margins of the data is log 2.
"""

import pyarrow as pa
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from flows.base.folder import padding_id
from flows.data.rows import Row, row_weights
from flows.errors import StageError
from flows.evaluation.result import COMMON, EvaluationResult, common_columns, common_metrics
from flows.evaluation.scoring import RowLosses, pairs_rewards
from flows.params import Params
from flows.runtime.progress import progress
from flows.training.objectives import reward_objective
from peftcore.train import BradleyTerry

REWARDS = (
    *((f"{side}_{name}", pa.float64()) for name in ("margin", "accuracy") for side in ("base", "adapter")),
    ("chosen_reward", pa.float64()),
    ("rejected_reward", pa.float64()),
)
"""Columns after the common ones: margins (reward of the chosen less that of the rejected answer), 1 for a margin above
0 (1/2 for a margin of 0), and the adapter's rewards."""


def evaluate_rewards(
    params: Params, model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: list[Row]
) -> EvaluationResult:
    """Evaluate the reward model against equal rewards.

    Args:
        params: The parameters of the run.
        model: A sequence classifier with one output.
        tokenizer: The base's tokenizer.
        rows: Prepared rows of the test split.

    Raises:
        StageError: A reward is not finite.
    """
    pair_loss = reward_objective(params)
    with progress(len(rows), "evaluate", "row") as bar:
        rewards = pairs_rewards(model, rows, padding_id(tokenizer), params.evaluate.batch_size, bar)
    check_finite(rows, rewards)
    chosen, rejected = rewards
    losses = {
        "base": reward_losses(pair_loss, rows, torch.zeros_like(rewards)),
        "adapter": reward_losses(pair_loss, rows, rewards),
    }
    margins = {"base": torch.zeros_like(chosen), "adapter": chosen - rejected}
    accuracies = {name: reward_accuracies(side) for name, side in margins.items()}
    sides: dict[str, dict[str, float]] = {
        name: {
            "loss": losses[name].loss,
            "accuracy": accuracies[name].mean().item(),
            "margin": margins[name].mean().item(),
        }
        for name in losses
    }
    sides["adapter"] |= {"chosen_reward": chosen.mean().item(), "rejected_reward": rejected.mean().item()}
    metrics = common_metrics(rows, losses, sides["base"], sides["adapter"], ["accuracy", "margin"])
    metrics["baseline"] = "equal rewards for all answers"
    table = common_columns(rows, losses["base"], losses["adapter"])
    for i, row in enumerate(table):
        row |= {"chosen_reward": chosen[i].item(), "rejected_reward": rejected[i].item()}
        for name in losses:
            row |= {f"{name}_margin": margins[name][i].item(), f"{name}_accuracy": accuracies[name][i].item()}
    samples = [
        {
            "id": row["id"],
            "slice": row["slice"],
            "prompt": rows[i]["prompt"],
            "reference": rows[i]["chosen"],
            "base": "equal rewards",
            "adapter": f"{chosen[i]:.2f} for the reference, {rejected[i]:.2f} for: {rows[i]['rejected']}",
        }
        for i, row in enumerate(table[: params.evaluate.samples])
    ]
    return EvaluationResult(metrics, pa.Table.from_pylist(table, schema=pa.schema([*COMMON, *REWARDS])), samples)


def reward_losses(pair_loss: BradleyTerry, rows: list[Row], rewards: Tensor) -> RowLosses:
    """Return the loss of each pair. rewards: of the chosen and of the rejected answers, (2, rows)."""
    margins = torch.tensor([row.get("margin") or 0.0 for row in rows], dtype=rewards.dtype)
    tokens = [len(row["chosen_input_ids"]) + len(row["rejected_input_ids"]) for row in rows]
    weights = row_weights(rows)
    return RowLosses(pair_loss.losses(rewards[0], rewards[1], margins).tolist(), tokens, weights)


def reward_accuracies(margins: Tensor) -> Tensor:
    """Return 1 for each margin above 0, 1/2 for a margin of 0, and 0 for others, (rows,)."""
    return (margins.sign() + 1) / 2


def check_finite(rows: list[Row], rewards: Tensor) -> None:
    """Raise StageError if a reward, of (2, rows), is NaN or infinite."""
    faulty = (~rewards.isfinite()).any(0).nonzero().flatten().tolist()
    if faulty:
        raise StageError(
            f"{len(faulty)} of {len(rows)} pairs have rewards that are not finite, first row {rows[faulty[0]]['id']} "
            f"with {rewards[0, faulty[0]]:g} and {rewards[1, faulty[0]]:g}: the adapter's weights or activations have "
            "overflowed; train with a lower train.learning_rate, or give quantization.compute_dtype float32"
        )
