"""Evaluation of unpaired preferences: KTO loss, rewards of good and bad answers, and quality of generated answers.

The base is the reference. A row's `margin` (nats) is the log-ratio of adapter to base less the reference point for a
desirable answer, and the opposite for an undesirable one. `accuracy` is the share of rows with a margin above 0; a
margin of 0, such as every margin of the base, counts half. The reference point is that of all test rows.

Answers are generated for prompts of desirable rows, whose answers are the references of ROUGE-L.
"""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flows.data.rows import Row, row_weights
from flows.errors import StageError
from flows.evaluation.answers import ANSWERS, add_answers, known_lengths, sampled_prompts, samples, score_and_answer
from flows.evaluation.result import COMMON, EvaluationResult, common_columns, common_metrics
from flows.evaluation.scoring import AnswerLogProbs, RowLosses, answers_log_probs
from flows.params import Params
from flows.training.objectives import kto_objective
from peftcore.train import Kto, kto_reference_point

UNPAIRED = (
    ("desirable", pa.bool_()),
    *((f"{side}_{name}", pa.float64()) for name in ("margin", "accuracy") for side in ("base", "adapter")),
    ("reward", pa.float64()),
)
"""Columns after the common ones: the mark, margins (nats), 1 for a correct one, and the adapter's implicit reward."""


@dataclass(frozen=True)
class AnswerScores:
    """Loss, margin (nats), accuracy (0, 1/2 or 1) and reward of each row under one model, and the reference point."""

    losses: RowLosses
    margins: Tensor
    accuracies: Tensor
    rewards: Tensor
    reference_point: float


def answer_scores(kto: Kto, rows: list[Row], model: AnswerLogProbs, reference: AnswerLogProbs) -> AnswerScores:
    """Return the scores of the rows under a model, compared with its reference."""
    desirable = torch.tensor([row["desirable"] for row in rows])
    ratios = model.own - reference.own
    point = kto_reference_point(model.mismatched - reference.mismatched)
    margins = kto.gains(ratios, desirable, point)
    losses = kto.losses(ratios, desirable, point).tolist()
    weights = row_weights(rows)
    accuracies = (margins.sign() + 1) / 2
    return AnswerScores(RowLosses(losses, model.tokens, weights), margins, accuracies, kto.beta * ratios, point.item())


def evaluate_unpaired(
    params: Params, model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[Row]
) -> EvaluationResult:
    """Evaluate the base and the adapter on the same rows and weights.

    Args:
        params: The parameters of the run.
        model: A PeftModel; the adapter is disabled for the base.
        tokenizer: The base's tokenizer.
        rows: Prepared rows of the test split.

    Raises:
        StageError: No row is desirable, so there is no reference answer.
    """
    evaluate, kto = params.evaluate, kto_objective(params)
    good = [number for number, row in enumerate(rows) if row["desirable"]]
    if not good:
        raise StageError(
            f"none of the {len(rows)} test rows is desirable, so generated answers have no reference; give more data, "
            "or a larger evaluate.rows"
        )
    prompts = sampled_prompts(rows, "input_ids", "completion", params, good)
    log_probs, answered = score_and_answer(model, tokenizer, rows, prompts, evaluate, answers_log_probs)
    scores = {name: answer_scores(kto, rows, side, log_probs["base"]) for name, side in log_probs.items()}
    sides: dict[str, dict[str, float]] = {
        name: {
            "loss": side.losses.loss,
            "accuracy": side.accuracies.mean().item(),
            "margin": side.margins.mean().item(),
            **answered[name].metrics(),
        }
        for name, side in scores.items()
    }
    sides["adapter"] |= {"kl": scores["adapter"].reference_point, **_rewards(scores["adapter"].rewards, good)}
    losses = {name: side.losses for name, side in scores.items()}
    gains = ["accuracy", "margin", "rouge_l"]
    metrics = common_metrics(rows, losses, sides["base"], sides["adapter"], gains) | {"generated_rows": len(prompts)}
    metrics["answers"] = known_lengths(rows, prompts, "input_ids", evaluate)
    table = common_columns(rows, losses["base"], losses["adapter"])
    for i, row in enumerate(table):
        row |= {"desirable": rows[i]["desirable"], "reward": scores["adapter"].rewards[i].item()}
        for name, side in scores.items():
            row |= {f"{name}_margin": side.margins[i].item(), f"{name}_accuracy": side.accuracies[i].item()}
    add_answers(table, prompts, answered)
    return EvaluationResult(
        metrics,
        pa.Table.from_pylist(table, schema=pa.schema([*COMMON, *UNPAIRED, *ANSWERS])),
        samples(rows, prompts, answered, evaluate.samples),
    )


def _rewards(rewards: Tensor, good: list[int]) -> dict[str, float]:
    """Return the mean reward of desirable and of undesirable rows and their difference, as far as there are rows."""
    is_good = torch.zeros(len(rewards), dtype=torch.bool)
    is_good[good] = True
    desirable = rewards[is_good].mean().item()
    if is_good.all():
        return {"reward_desirable": desirable}
    undesirable = rewards[~is_good].mean().item()
    return {
        "reward_desirable": desirable,
        "reward_undesirable": undesirable,
        "reward_margin": desirable - undesirable,
    }
