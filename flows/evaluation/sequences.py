"""Evaluation of sources with targets: loss of the targets, and quality of the generated texts."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from flows.data.rows import Row
from flows.evaluation.answers import evaluate_answers
from flows.evaluation.result import EvaluationResult
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
    return evaluate_answers(params, model, tokenizer, rows, "target", sequence_losses, _target_tokens)


def _target_tokens(row: Row) -> int:
    return len(row["labels"])
