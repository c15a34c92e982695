"""Generated answers to the prompts of held-out rows, compared with the reference answers."""

import contextlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from flows.base.folder import padding_id
from flows.data.rows import Row
from flows.evaluation.generation import Answers, generate_answers
from flows.evaluation.prompt_states import PromptStates
from flows.evaluation.result import COMMON, EvaluationResult, common_columns, common_metrics
from flows.evaluation.scoring import RowLosses, rouge_l, row_losses
from flows.params import Evaluate, Params
from flows.runtime.progress import progress

Scores = TypeVar("Scores")

ANSWERS = (
    ("reference", pa.string()),
    ("base_answer", pa.string()),
    ("adapter_answer", pa.string()),
    ("base_rouge_l", pa.float64()),
    ("adapter_rouge_l", pa.float64()),
    ("base_ended", pa.bool_()),
    ("adapter_ended", pa.bool_()),
)
"""Columns of a table of answers; null for rows without generated answers. `*_ended`: the answer ends with EOS."""


@dataclass(frozen=True)
class Prompt:
    """One row to answer. row: index among the test rows; ids: token ids; reference: the known answer."""

    row: int
    ids: list[int]
    reference: str


@dataclass(frozen=True)
class Answered:
    """One model's answers, and the ROUGE-L of each."""

    answers: Answers
    rouge_l: list[float]

    def metrics(self) -> dict[str, float]:
        """Return the means over the answers; "ended" is the EOS rate."""
        ended = [answer.has_eos for answer in self.answers.answers]
        return {
            "rouge_l": sum(self.rouge_l) / len(self.rouge_l),
            "ended": sum(ended) / len(ended),
            "tokens_per_second": round(self.answers.tokens_per_second, 1),
        }


def sampled_prompts(
    rows: Sequence[Row],
    ids: str,
    reference: str,
    params: Params,
    among: Sequence[int] | None = None,
    most: int | None = None,
) -> list[Prompt]:
    """Return the prompts of a random sample of the rows.

    Args:
        rows: Prepared rows of the test split.
        ids: Name of the column with the token ids of prompt and reference answer.
        reference: Name of the column with the text of the reference answer.
        params: The parameters of the run, with the seed of the sample.
        among: Indices of the rows to sample from. None: all.
        most: Maximum size of the sample. None: `evaluate.generate_rows`.
    """
    candidates = range(len(rows)) if among is None else among
    count = min(params.evaluate.generate_rows if most is None else most, len(candidates))
    sampled = sorted(random.Random(params.project.seed).sample(candidates, count))
    return [Prompt(i, rows[i][ids][: rows[i]["prompt_length"]], rows[i][reference]) for i in sampled]


def score_and_answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    prompts: Sequence[Prompt],
    evaluate: Evaluate,
    score: Callable[..., Scores],
) -> tuple[dict[str, Scores], dict[str, Answered]]:
    """Return the scores of the rows, and the greedy answers to the prompts, for the base and for the adapter.

    Args:
        model: A PeftModel; the adapter is disabled for the base.
        tokenizer: The base's tokenizer.
        rows: Prepared rows of the test split.
        prompts: The prompts to answer.
        evaluate: The section `evaluate` of params.yaml.
        score: `row_losses`, `pairs_log_probs` or `answers_log_probs`.

    Returns:
        {"base": scores, "adapter": scores}, and the answers under the same keys.
    """
    ids = [prompt.ids for prompt in prompts]
    scores: dict[str, Scores] = {}
    answered: dict[str, Answered] = {}
    with progress(2 * (len(rows) + len(prompts)), "evaluate", "row") as bar:
        for name, context in (("base", model.disable_adapter()), ("adapter", contextlib.nullcontext())):
            states = PromptStates([prompt.row for prompt in prompts], [len(prompt) for prompt in ids])
            options = {"prompts": states} if score is row_losses else {}  # the other functions keep no states
            with context:
                with progress(len(rows), f"losses of the {name}", "row", part_of=bar) as part:
                    scores[name] = score(model, rows, padding_id(tokenizer), evaluate.batch_size, part, **options)
                with progress(len(prompts), f"answers of the {name}", "row", part_of=bar) as part:
                    answers = generate_answers(
                        model, tokenizer, ids, evaluate.max_new_tokens, evaluate.batch_size, part, states=states
                    )
            texts = [answer.text for answer in answers.answers]
            answered[name] = Answered(answers, rouge_l([prompt.reference for prompt in prompts], texts))
    return scores, answered


def evaluate_answers(
    params: Params,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    reference: str,
    score: Callable[..., RowLosses],
    length: Callable[[Row], int],
) -> EvaluationResult:
    """Evaluate the losses of the reference answers and the generated answers of the base and the adapter.

    Args:
        params: The parameters of the run.
        model: A PeftModel; the adapter is disabled for the base.
        tokenizer: The base's tokenizer.
        rows: Prepared rows of the test split.
        reference: Name of the column with the text of the reference answer.
        score: `row_losses` or `sequence_losses`.
        length: Returns the tokens of a row's reference answer, with the end of turn.
    """
    evaluate = params.evaluate
    prompts = sampled_prompts(rows, "input_ids", reference, params)
    losses, answered = score_and_answer(model, tokenizer, rows, prompts, evaluate, score)
    base, adapter = (
        {"loss": losses[name].loss, "perplexity": losses[name].perplexity} | answered[name].metrics()
        for name in ("base", "adapter")
    )
    metrics = common_metrics(rows, losses, base, adapter, ["rouge_l"]) | {"generated_rows": len(prompts)}
    metrics["answers"] = answer_limit([length(rows[prompt.row]) for prompt in prompts], evaluate)
    table = common_columns(rows, losses["base"], losses["adapter"])
    add_answers(table, prompts, answered)
    return EvaluationResult(
        metrics,
        pa.Table.from_pylist(table, schema=pa.schema([*COMMON, *ANSWERS])),
        samples(rows, prompts, answered, evaluate.samples),
    )


def known_lengths(rows: Sequence[Row], prompts: Sequence[Prompt], ids: str, evaluate: Evaluate) -> dict[str, Any]:
    """Return the metrics `max_new_tokens` and `longer_known_answers`, the share of reference answers above that limit.

    Args:
        rows: Prepared rows of the test split.
        prompts: Prompts of some of the rows.
        ids: Name of the column with the token ids of prompt, reference answer and end of turn.
        evaluate: The section `evaluate` of params.yaml.
    """
    return answer_limit([len(rows[prompt.row][ids]) - len(prompt.ids) for prompt in prompts], evaluate)


def answer_limit(lengths: Sequence[int], evaluate: Evaluate) -> dict[str, Any]:
    """Return the metrics `max_new_tokens` and `longer_known_answers` for answers of these lengths (tokens)."""
    longer = sum(length > evaluate.max_new_tokens for length in lengths) / len(lengths)
    return {"max_new_tokens": evaluate.max_new_tokens, "longer_known_answers": longer}


def add_answers(table: list[Row], prompts: Sequence[Prompt], answered: Mapping[str, Answered]) -> None:
    """Add the ANSWERS columns to the rows with generated answers.

    Args:
        table: Rows of the evaluation's table; changed in place.
        prompts: The answered prompts.
        answered: {"base": answers, "adapter": answers}, in the order of the prompts.
    """
    for index, prompt in enumerate(prompts):
        table[prompt.row]["reference"] = prompt.reference
        for name, one in answered.items():
            output = one.answers.answers[index]
            table[prompt.row] |= {
                f"{name}_answer": output.text,
                f"{name}_ended": output.has_eos,
                f"{name}_rouge_l": one.rouge_l[index],
            }


def samples(
    rows: Sequence[Row], prompts: Sequence[Prompt], answered: Mapping[str, Answered], count: int
) -> list[dict[str, str]]:
    """Return the first `count` prompts with both models' answers."""
    return [
        {
            "id": rows[prompt.row]["id"],
            "slice": rows[prompt.row]["slice"],
            "prompt": rows[prompt.row]["prompt"],
            "reference": prompt.reference,
        }
        | {name: one.answers.answers[place].text for name, one in answered.items()}
        for place, prompt in enumerate(prompts[:count])
    ]
