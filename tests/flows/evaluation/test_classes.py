"""Labelled texts: a classifier of known logits against the frequencies of the classes, by hand."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from flows.data.rows import Row
from flows.evaluation.classes import evaluate_classes, frequencies
from flows.params import Params

NAMES = ["cold", "warm", "wet"]
TRAIN = [1, 1, 1, 1, 0, 0, 2]
"""Of seven training rows, four are warm."""


class ByFirstToken(nn.Module):
    """A classifier that gives the class of a text's first token a probability of 0.8, and each other one 0.1."""

    def __init__(self) -> None:
        super().__init__()
        self.anything = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        logits = torch.full((len(input_ids), 3), 0.1).log()
        return SimpleNamespace(
            logits=logits.index_put((torch.arange(len(input_ids)), input_ids[:, 0]), torch.log(torch.tensor(0.8)))
        )


def row(first: int, label: int, **others: Any) -> Row:
    text = f"{first} {label}"
    return {"id": text, "slice": "all", "text": text, "input_ids": [first, *[5] * label], "label": label, **others}


@pytest.fixture
def result(tokenizer: PreTrainedTokenizerBase) -> Any:
    rows = [row(0, 0), row(1, 0), row(1, 1), row(2, 2)]
    params = Params.model_validate({"evaluate": {"batch_size": 3, "samples": 2, "generate_rows": 4}})
    return evaluate_classes(params, ByFirstToken(), tokenizer, rows, NAMES, TRAIN)


def test_the_classifier_is_measured(result: Any) -> None:
    losses = [-math.log(p) for p in (0.8, 0.1, 0.8, 0.8)]
    adapter = result.metrics["adapter"]
    assert [line["adapter_loss"] for line in result.table.to_pylist()] == pytest.approx(losses, rel=1e-6)
    assert adapter["loss"] == pytest.approx(sum(losses) / 4, rel=1e-6), "each text counts once, however long"
    assert adapter["accuracy"] == 0.75
    # cold: one of two found; warm: found, and once more; wet: found. F1 = 2TP / (2TP + FP + FN)
    assert adapter["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)


def test_the_base_predicts_the_most_frequent_class_of_the_training_rows(result: Any) -> None:
    base, told = result.metrics["base"], result.table.to_pylist()
    assert {line["base_prediction"] for line in told} == {"warm"}
    assert base["accuracy"] == 0.25
    prior = [3 / 10, 5 / 10, 2 / 10]
    assert base["loss"] == pytest.approx(-sum(math.log(prior[label]) for label in (0, 0, 1, 2)) / 4)
    assert result.metrics["gain"]["accuracy"] == 0.5
    assert result.metrics["gain"]["loss"] == base["loss"] - result.metrics["adapter"]["loss"]


def test_rows_and_samples_have_the_names_of_classes(result: Any) -> None:
    told = result.table.to_pylist()
    assert [line["label"] for line in told] == ["cold", "cold", "warm", "wet"]
    assert [line["adapter_prediction"] for line in told] == ["cold", "warm", "warm", "wet"]
    assert [line["adapter_confidence"] for line in told] == pytest.approx([0.8] * 4, rel=1e-6)
    assert [(one["prompt"], one["reference"], one["adapter"]) for one in result.samples] == [
        ("0 0", "cold", "cold"),
        ("1 0", "cold", "warm"),
    ]


def test_a_rows_weight_counts_in_the_loss_and_not_in_the_accuracy(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [row(0, 0, weight=3.0), row(1, 0, weight=1.0)]
    metrics = evaluate_classes(Params(), ByFirstToken(), tokenizer, rows, NAMES, TRAIN).metrics
    expected = -(3 * math.log(0.8) + math.log(0.1)) / 4
    assert metrics["adapter"]["loss"] == pytest.approx(expected, rel=1e-6)
    assert metrics["baseline"] == "a prediction of the class frequencies of the training rows"
    assert metrics["adapter"]["accuracy"] == 0.5


def test_a_class_without_training_rows_has_a_frequency_too() -> None:
    """Laplace's rule of succession: (count + 1) / (rows + classes)."""
    assert frequencies([0, 0, 2], 4).exp().tolist() == pytest.approx([3 / 7, 1 / 7, 2 / 7, 1 / 7])
