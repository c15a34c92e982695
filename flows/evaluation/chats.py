"""Evaluation of chats: loss of the reference answers, and quality of generated answers."""

import contextlib
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from flows.base.model import padding_id
from flows.data.rows import Row
from flows.evaluation.answers import ANSWERS, Answered, Prompt, add_answers, answer, known_lengths, sampled, samples
from flows.evaluation.result import COMMON, EvaluationResult, common_columns, common_metrics
from flows.evaluation.scoring import RowLosses, row_losses
from flows.params import Params
from flows.runtime.progress import progress


def evaluate_chats(params: Params, model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> EvaluationResult:
    """Evaluate the base and the adapter on the same rows and weights.

    Args:
        params: The parameters of the run.
        model: A PeftModel; the adapter is disabled for the base.
        tokenizer: The base's tokenizer.
        rows: Prepared rows of the test split.
    """
    evaluate = params.evaluate
    prompts = [
        Prompt(i, rows[i]["input_ids"][: rows[i]["prompt_length"]], rows[i]["completion"])
        for i in sampled(len(rows), evaluate, params.project.seed)
    ]
    losses: dict[str, RowLosses] = {}
    answered: dict[str, Answered] = {}
    with progress(2 * (len(rows) + len(prompts)), "evaluate", "row") as bar:
        for name, context in (("base", model.disable_adapter()), ("adapter", contextlib.nullcontext())):
            with context:
                with progress(len(rows), f"losses of the {name}", "row", part_of=bar) as part:
                    losses[name] = row_losses(model, rows, padding_id(tokenizer), evaluate.batch_size, part)
                with progress(len(prompts), f"answers of the {name}", "row", part_of=bar) as part:
                    answered[name] = answer(model, tokenizer, prompts, evaluate, part)
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
