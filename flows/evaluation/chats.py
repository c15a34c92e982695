"""Evaluation of chats: loss of the reference answers, and quality of generated answers."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from flows.data.rows import Row
from flows.evaluation.answers import evaluate_answers
from flows.evaluation.result import EvaluationResult
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
    return evaluate_answers(params, model, tokenizer, rows, "completion", row_losses, _answer_tokens)


def _answer_tokens(row: Row) -> int:
    return len(row["input_ids"]) - row["prompt_length"]
