"""Chats: losses of base and adapter by whole forward passes, and answers of the sampled rows by either."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from flows.data.chat import ChatTokenizer
from flows.data.examples import question_and_answer
from flows.data.rows import Row
from flows.evaluation.chats import evaluate_chats
from flows.evaluation.generation import generate_answers
from flows.params import Params


@pytest.fixture
def rows(tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    chats = ChatTokenizer(tokenizer)
    texts = [("One?", "1."), ("Two and two?", "4"), ("Three?", "That is 3.")]
    tokens = [chats.tokenize(question_and_answer(question, answer, None)) for question, answer in texts]
    return [one.columns() | {"id": one.id, "slice": "all", "weight": 1.0} for one in tokens]


def test_each_side_has_its_own_losses(
    adapted: Any, tokenizer: PreTrainedTokenizerBase, rows: list[Row], answering: Callable[..., Params]
) -> None:
    result = evaluate_chats(answering(), adapted, tokenizer, rows)
    told = result.table.to_pylist()
    for name in ("base", "adapter"):
        total, tokens = 0.0, 0
        for row, line in zip(rows, told, strict=True):
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
            with torch.no_grad():
                if name == "base":
                    with adapted.disable_adapter():
                        logits = adapted(ids).logits[0, :-1]
                else:
                    logits = adapted(ids).logits[0, :-1]
            assert line[f"{name}_loss"] == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-6)
            total += line[f"{name}_loss"] * line["tokens"]
            tokens += line["tokens"]
        assert result.metrics[name]["loss"] == pytest.approx(total / tokens)
        assert result.metrics[name]["perplexity"] == pytest.approx(math.exp(total / tokens))
    assert result.metrics["base"]["loss"] != result.metrics["adapter"]["loss"]


def test_each_side_answers_for_itself(
    adapted: Any, tokenizer: PreTrainedTokenizerBase, rows: list[Row], answering: Callable[..., Params]
) -> None:
    result = evaluate_chats(answering(), adapted, tokenizer, rows)
    answered = [(row, line) for row, line in zip(rows, result.table.to_pylist(), strict=True) if line["reference"]]
    assert len(answered) == result.metrics["generated_rows"] == 2
    prompts = [row["input_ids"][: row["prompt_length"]] for row, _ in answered]
    texts = {"adapter": generate_answers(adapted, tokenizer, prompts, 3, 2)}
    with adapted.disable_adapter():
        texts["base"] = generate_answers(adapted, tokenizer, prompts, 3, 2)
    for name, answers in texts.items():
        assert [line[f"{name}_answer"] for _, line in answered] == [answer.text for answer in answers.answers]
    assert texts["base"].answers[0].text != texts["adapter"].answers[0].text
    assert [line["reference"] for _, line in answered] == [row["completion"] for row, _ in answered]
    (sample,) = result.samples
    assert (sample["id"], sample["base"]) == (answered[0][1]["id"], answered[0][1]["base_answer"])


def test_a_model_is_left_with_its_adapter(
    adapted: Any, tokenizer: PreTrainedTokenizerBase, rows: list[Row], answering: Callable[..., Params]
) -> None:
    ids = torch.tensor([rows[0]["input_ids"]])
    with torch.no_grad():
        before = adapted(ids).logits
        evaluate_chats(answering(), adapted, tokenizer, rows)
        torch.testing.assert_close(adapted(ids).logits, before, rtol=0, atol=0)
