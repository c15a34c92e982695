"""Evaluation of sources with targets: loss of the targets, and quality of the generated texts."""

from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from flows.data.rows import Row
from flows.evaluation.answers import ANSWERS, add_answers, sampled_prompts, samples, score_and_answer
from flows.evaluation.result import COMMON, EvaluationResult, common_columns, common_metrics
from flows.evaluation.scoring import sequence_losses
from flows.params import Params


def evaluate_sequences(
    params: Params, model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[Row]
) -> EvaluationResult:
    """Evaluate the base and the adapter on the same rows and weights.

    Args:
        params: The parameters of the run.
        model: A PeftModel over an encoder-decoder; the adapter is disabled for the base.
        tokenizer: The base's tokenizer.
        rows: Prepared rows of the test split.
    """
    evaluate = params.evaluate
    prompts = sampled_prompts(rows, "input_ids", "target", params)
    losses, answered = score_and_answer(model, tokenizer, rows, prompts, evaluate, sequence_losses)
    base, adapter = (
        {"loss": losses[name].loss, "perplexity": losses[name].perplexity} | answered[name].metrics()
        for name in ("base", "adapter")
    )
    metrics = common_metrics(rows, losses, base, adapter, ["rouge_l"]) | {"generated_rows": len(prompts)}
    longer = sum(len(rows[prompt.row]["labels"]) > evaluate.max_new_tokens for prompt in prompts) / len(prompts)
    metrics["answers"] = {"max_new_tokens": evaluate.max_new_tokens, "longer_known_answers": longer}
    table = common_columns(rows, losses["base"], losses["adapter"])
    add_answers(table, prompts, answered)
    return EvaluationResult(
        metrics,
        pa.Table.from_pylist(table, schema=pa.schema([*COMMON, *ANSWERS])),
        samples(rows, prompts, answered, evaluate.samples),
    )
