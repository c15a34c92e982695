"""Answers of a model's own to the prompts of held-out rows, beside the answer that is known."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flows.data.rows import Row
from flows.evaluation.generation import Answers, generate_answers
from flows.evaluation.scoring import rouge_l
from flows.params import Evaluate

ANSWERS = (
    ("reference", pa.string()),
    ("base_answer", pa.string()),
    ("adapter_answer", pa.string()),
    ("base_rouge_l", pa.float64()),
    ("adapter_rouge_l", pa.float64()),
    ("base_ended", pa.bool_()),
    ("adapter_ended", pa.bool_()),
)
"""Columns of a table of answers; null for rows that were only scored."""


@dataclass(frozen=True)
class Prompt:
    """One row to answer. row: its number among the test rows; ids: token ids; reference: the answer that is known."""

    row: int
    ids: list[int]
    reference: str


@dataclass(frozen=True)
class Answered:
    """One model's answers, and the ROUGE-L of each."""

    answers: Answers
    rouge_l: list[float]

    def metrics(self) -> dict[str, float]:
        """Means over the answers."""
        ended = [answer.ended for answer in self.answers.answers]
        return {
            "rouge_l": sum(self.rouge_l) / len(self.rouge_l),
            "ended": sum(ended) / len(ended),
            "tokens_per_second": round(self.answers.tokens_per_second, 1),
        }


def sampled(count: int, evaluate: Evaluate, seed: int) -> list[int]:
    """Numbers of the rows, of `count`, that are answered."""
    return sorted(random.Random(seed).sample(range(count), min(evaluate.generate_rows, count)))


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    evaluate: Evaluate,
    bar: Any,
) -> Answered:
    """The model's greedy answers. bar: moved on by rows."""
    ids = [prompt.ids for prompt in prompts]
    answers = generate_answers(model, tokenizer, ids, evaluate.max_new_tokens, evaluate.batch_size, bar)
    texts = [answer.text for answer in answers.answers]
    return Answered(answers, rouge_l([prompt.reference for prompt in prompts], texts))


def known_lengths(rows: Sequence[Row], prompts: Sequence[Prompt], ids: str, evaluate: Evaluate) -> dict[str, Any]:
    """How many tokens an answer may have, and the share of the known answers that have more.

    ids: the column of the tokens of prompt, known answer and its end.
    """
    lengths = [len(rows[prompt.row][ids]) - len(prompt.ids) for prompt in prompts]
    longer = sum(length > evaluate.max_new_tokens for length in lengths) / len(lengths)
    return {"max_new_tokens": evaluate.max_new_tokens, "longer_known_answers": longer}


def add_answers(table: list[Row], prompts: Sequence[Prompt], answered: Mapping[str, Answered]) -> None:
    """Put the ANSWERS columns into the rows that were answered; answered: {"base", "adapter"}."""
    for place, prompt in enumerate(prompts):
        table[prompt.row]["reference"] = prompt.reference
        for name, one in answered.items():
            found = one.answers.answers[place]
            table[prompt.row] |= {
                f"{name}_answer": found.text,
                f"{name}_ended": found.ended,
                f"{name}_rouge_l": one.rouge_l[place],
            }


def samples(
    rows: Sequence[Row], prompts: Sequence[Prompt], answered: Mapping[str, Answered], count: int
) -> list[dict[str, str]]:
    """The first `count` prompts with both models' answers."""
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
