"""Tagged words: a token classifier of known logits against the frequencies of the tags, by hand."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from flows.data.rows import Row
from flows.evaluation.fidelity import Reference, tag_fidelity
from flows.evaluation.tags import evaluate_tags
from flows.gate.rows import mean_value
from flows.params import Params

NAMES = ["B-X", "I-X", "O"]
TRAIN = [[-100, 2, 2], [0, 1, 2, -100]]
"""Of five training words, three are outside."""


class ByToken(nn.Module):
    """A tagger that gives the tag number `token` a probability of 0.8, and each other one 0.1."""

    def __init__(self, sure: float = 0.8) -> None:
        super().__init__()
        self.anything = nn.Parameter(torch.zeros(1))
        self.sure = sure

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        likely = nn.functional.one_hot(input_ids.clamp(max=2), 3).bool()
        return SimpleNamespace(logits=torch.where(likely, self.sure, (1 - self.sure) / 2).log())


def row(predicted: list[int], tags: str, **others: Any) -> Row:
    """A row with a token before and after each word; the token at a word is the tag that is predicted for it."""
    labels = [NAMES.index(tag) for tag in tags.split()]
    return {
        "id": tags,
        "slice": "all",
        "text": "words",
        "tags": tags,
        "input_ids": [n for tag in predicted for n in (tag, 9)],
        "labels": [n for label in labels for n in (label, -100)],
        **others,
    }


@pytest.fixture
def rows() -> list[Row]:
    return [
        row([0, 1, 2], "B-X I-X O"),  # the entity is found
        row([0, 0, 2], "B-X I-X O", id="two"),  # two entities instead of one
        row([2, 2, 0, 2], "O O B-X B-X", id="three"),  # one of two
    ]


@pytest.fixture
def result(tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> Any:
    params = Params.model_validate({"evaluate": {"batch_size": 2, "samples": 2, "generate_rows": 3}})
    return evaluate_tags(params, ByToken(), tokenizer, rows, NAMES, TRAIN)


def test_the_tagger_is_measured_by_entities_and_words(result: Any) -> None:
    adapter, told = result.metrics["adapter"], result.table.to_pylist()
    right, wrong = -math.log(0.8), -math.log(0.1)
    losses = [right, (2 * right + wrong) / 3, (3 * right + wrong) / 4]
    assert [line["adapter_loss"] for line in told] == pytest.approx(losses, rel=1e-6)
    assert adapter["loss"] == pytest.approx((8 * right + 2 * wrong) / 10, rel=1e-6), "each word counts once"
    assert [(line["entities"], line["adapter_entities"], line["adapter_correct"]) for line in told] == [
        (1, 1, 1),
        (1, 2, 0),
        (2, 1, 1),
    ]
    assert (adapter["precision"], adapter["recall"], adapter["entity_f1"]) == (0.5, 0.5, 0.5)
    assert adapter["tag_accuracy"] == 0.8
    assert mean_value(result.table, "entity_f1") == pytest.approx(0.5), "the gate's rows have the figure as their mean"


def test_the_base_predicts_the_most_frequent_tag_of_the_training_words(result: Any) -> None:
    base, told = result.metrics["base"], result.table.to_pylist()
    assert {tag for line in told for tag in line["base_prediction"].split()} == {"O"}
    assert (base["entity_f1"], base["precision"], base["recall"]) == (0, 0, 0)
    prior = {"B-X": 2 / 8, "I-X": 2 / 8, "O": 4 / 8}
    words = [tag for line in told for tag in line["label"].split()]
    assert base["loss"] == pytest.approx(-sum(math.log(prior[tag]) for tag in words) / 10)
    assert result.metrics["gain"]["entity_f1"] == 0.5
    assert mean_value(result.table, "entity_f1", "base") == 0


def test_rows_and_samples_have_the_tags_by_name(result: Any) -> None:
    assert result.table.to_pylist()[1]["adapter_prediction"] == "B-X B-X O"
    assert [(one["reference"], one["adapter"]) for one in result.samples] == [
        ("B-X I-X O", "B-X I-X O"),
        ("B-X I-X O", "B-X B-X O"),
    ]
    assert result.metrics["calibration"]["adapter"]["predictions"] == 10


def test_a_rows_weight_counts_in_the_loss_and_not_in_f1(tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> None:
    weighted = [one | {"weight": weight} for one, weight in zip(rows, (0.0, 0.0, 2.0), strict=True)]
    metrics = evaluate_tags(Params(), ByToken(), tokenizer, weighted, NAMES, TRAIN).metrics
    assert metrics["adapter"]["loss"] == pytest.approx(-(3 * math.log(0.8) + math.log(0.1)) / 4, rel=1e-6)
    assert metrics["adapter"]["entity_f1"] == 0.5


def test_plain_tags_are_entities_of_a_word(tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> None:
    params = Params.model_validate(
        {
            "data": {"source": "a.jsonl", "kind": "token_classification", "tag_scheme": "plain"},
            "train": {"objective": "token_classification"},
        }
    )
    metrics = evaluate_tags(params, ByToken(), tokenizer, rows, NAMES, TRAIN).metrics
    # of six true and five predicted words that are not O, five less one are right
    assert metrics["adapter"]["entity_f1"] == pytest.approx(2 * 4 / (6 + 5))
    assert metrics["baseline"] == "a prediction of the tag frequencies of the training rows"


def test_fidelity_is_over_words(rows: list[Row]) -> None:
    reference = Reference(ByToken(), rows, 0, 2)
    same, other = tag_fidelity(reference, ByToken()), tag_fidelity(reference, ByToken(0.6))
    assert (same.kl, same.top1_agreement, same.tokens) == (pytest.approx(0, abs=1e-9), 1.0, 10)
    expected = 0.8 * math.log(0.8 / 0.6) + 2 * 0.1 * math.log(0.1 / 0.2)
    assert other.kl == pytest.approx(expected, rel=1e-5) and other.top1_agreement == 1.0
    assert other.reference_loss == same.loss == pytest.approx(-(8 * math.log(0.8) + 2 * math.log(0.1)) / 10, rel=1e-6)
