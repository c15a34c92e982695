"""Evaluation of preference pairs: preference accuracy and margins, and quality of generated answers.

`accuracy` is the share of pairs whose chosen answer has the higher log-probability; `margin` is the mean difference
(nats). Both use sums or means over an answer's tokens, as the objective does. `reward_accuracy` and `reward_margin`
compare the adapter with the base. The base is DPO's reference, so the base's own DPO loss is log 2.
"""

from typing import Any

import pyarrow as pa
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flows.data.rows import Row, row_weights
from flows.evaluation.answers import ANSWERS, add_answers, known_lengths, sampled_prompts, samples, score_and_answer
from flows.evaluation.result import COMMON, EvaluationResult, common_columns, common_metrics
from flows.evaluation.scoring import RowLosses, pairs_log_probs
from flows.params import Params
from flows.training.objectives import preference_objective
from peftcore.train import Dpo, PairLogProbs, PreferenceObjective

PAIRS = (
    ("base_margin", pa.float64()),
    ("adapter_margin", pa.float64()),
    ("reward_margin", pa.float64()),
)
"""Columns after the common ones: log-probability of the chosen minus the rejected answer, and reward margin (nats)."""


def evaluate_pairs(params: Params, model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> EvaluationResult:
    """Evaluate the base and the adapter on the same rows and weights.

    Args:
        params: The parameters of the run.
        model: A PeftModel; the adapter is disabled for the base.
        tokenizer: The base's tokenizer.
        rows: Prepared rows of the test split.
    """
    evaluate, objective = params.evaluate, preference_objective(params)
    prompts = sampled_prompts(rows, "chosen_input_ids", "chosen", params)
    log_probs, answered = score_and_answer(model, tokenizer, rows, prompts, evaluate, pairs_log_probs)
    tokens = (log_probs["base"].chosen_tokens + log_probs["base"].rejected_tokens).int().tolist()
    weights = row_weights(rows)
    losses, margins, sides = {}, {}, {}
    rewards: dict[str, Any] = {}
    for name, side in log_probs.items():
        values, rewards = objective.losses(side, log_probs["base"])
        losses[name] = RowLosses(values.tolist(), tokens, weights)
        margins[name] = pair_margins(objective, side)
        sides[name] = {
            "loss": losses[name].loss,
            "accuracy": (margins[name] > 0).double().mean().item(),
            "margin": margins[name].mean().item(),
            **answered[name].metrics(),
        }
    if objective.uses_reference:  # the last rewards are the adapter's
        sides["adapter"]["reward_accuracy"] = rewards["rewards/accuracies"].mean().item()
        sides["adapter"]["reward_margin"] = rewards["rewards/margins"].mean().item()
    gains = ["accuracy", "margin", "rouge_l"]
    metrics = common_metrics(rows, losses, sides["base"], sides["adapter"], gains) | {"generated_rows": len(prompts)}
    metrics["answers"] = known_lengths(rows, prompts, "chosen_input_ids", evaluate)
    table = common_columns(rows, losses["base"], losses["adapter"])
    for i, row in enumerate(table):
        row |= {f"{name}_margin": margins[name][i].item() for name in margins}
        row["reward_margin"] = rewards["rewards/margins"][i].item()
    add_answers(table, prompts, answered)
    return EvaluationResult(
        metrics,
        pa.Table.from_pylist(table, schema=pa.schema([*COMMON, *PAIRS, *ANSWERS])),
        samples(rows, prompts, answered, evaluate.samples),
    )


def pair_margins(objective: PreferenceObjective, pairs: PairLogProbs) -> Tensor:
    """Return the log-probability of the chosen minus the rejected answer (nats), by sums or means as in the objective.

    Args:
        objective: The preference loss.
        pairs: Log-probabilities of n pairs.
    """
    sums = isinstance(objective, Dpo) and not (objective.length_normalized or objective.loss == "ipo")
    compared = pairs if sums else pairs.per_token()
    return compared.chosen - compared.rejected
