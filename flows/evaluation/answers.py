"""Generated answers to the prompts of held-out rows, compared with the reference answers."""

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


def sampled(count: int, evaluate: Evaluate, seed: int) -> list[int]:
    """Return the indices of the rows to answer, a random sample of `count` rows."""
    return sorted(random.Random(seed).sample(range(count), min(evaluate.generate_rows, count)))


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    evaluate: Evaluate,
    bar: Any,
) -> Answered:
    """Generate the model's greedy answers. bar: progress bar in rows."""
    ids = [prompt.ids for prompt in prompts]
    answers = generate_answers(model, tokenizer, ids, evaluate.max_new_tokens, evaluate.batch_size, bar)
    texts = [answer.text for answer in answers.answers]
    return Answered(answers, rouge_l([prompt.reference for prompt in prompts], texts))


def known_lengths(rows: Sequence[Row], prompts: Sequence[Prompt], ids: str, evaluate: Evaluate) -> dict[str, Any]:
    """Return the token limit of an answer, and the share of the reference answers that exceed the limit.

    ids: the column with the tokens of prompt, reference answer and end of turn.
    """
    lengths = [len(rows[prompt.row][ids]) - len(prompt.ids) for prompt in prompts]
    longer = sum(length > evaluate.max_new_tokens for length in lengths) / len(lengths)
    return {"max_new_tokens": evaluate.max_new_tokens, "longer_known_answers": longer}


def add_answers(table: list[Row], prompts: Sequence[Prompt], answered: Mapping[str, Answered]) -> None:
    """Add the ANSWERS columns to the rows that were answered; answered: {"base", "adapter"}."""
    for place, prompt in enumerate(prompts):
        table[prompt.row]["reference"] = prompt.reference
        for name, one in answered.items():
            output = one.answers.answers[place]
            table[prompt.row] |= {
                f"{name}_answer": output.text,
                f"{name}_ended": output.has_eos,
                f"{name}_rouge_l": one.rouge_l[place],
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
