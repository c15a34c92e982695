"""Evaluation of chats: loss of the reference answers, and quality of generated answers."""

from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from flows.data.rows import Row
from flows.evaluation.answers import ANSWERS, add_answers, known_lengths, sampled_prompts, samples, score_and_answer
from flows.evaluation.result import COMMON, EvaluationResult, common_columns, common_metrics
from flows.evaluation.scoring import row_losses
from flows.params import Params


def evaluate_chats(params: Params, model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> EvaluationResult:
    """Evaluate the base and the adapter on the same rows and weights.

    Args:
        params: The parameters of the run.
        model: A PeftModel; the adapter is disabled for the base.
        tokenizer: The base's tokenizer.
        rows: Prepared rows of the test split.
    """
    evaluate = params.evaluate
    prompts = sampled_prompts(rows, "input_ids", "completion", params)
    losses, answered = score_and_answer(model, tokenizer, rows, prompts, evaluate, row_losses)
    base, adapter = (
        {"loss": losses[name].loss, "perplexity": losses[name].perplexity} | answered[name].metrics()
        for name in ("base", "adapter")
    )
    metrics = common_metrics(rows, losses, base, adapter, ["rouge_l"]) | {"generated_rows": len(prompts)}
    metrics["answers"] = known_lengths(rows, prompts, "input_ids", evaluate)
    table = common_columns(rows, losses["base"], losses["adapter"])
    add_answers(table, prompts, answered)
    return EvaluationResult(
        metrics,
        pa.Table.from_pylist(table, schema=pa.schema([*COMMON, *ANSWERS])),
        samples(rows, prompts, answered, evaluate.samples),
    )
