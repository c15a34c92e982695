"""Calibration, against its definition, scikit-learn's Brier score, and probabilities that are right by construction."""

import pytest
import torch
from sklearn.metrics import brier_score_loss
from transformers import LlamaConfig, LlamaForCausalLM

from flows.evaluation.calibration import BINS, Calibration, class_calibration, token_calibration


def test_the_error_is_the_weighted_gap_of_each_bin() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])
    figures = class_calibration(probabilities.log(), torch.tensor([0, 1, 0, 1]))
    # the bin of 0.9: accuracy 1/2 of two; that of 0.6: 1 of one; that of 0.8: 1 of one
    assert figures["ece"] == pytest.approx(2 / 4 * 0.4 + 1 / 4 * 0.4 + 1 / 4 * 0.2)
    expected = [(0.1**2 + 0.1**2), (0.9**2 + 0.9**2), (0.4**2 + 0.4**2), (0.2**2 + 0.2**2)]
    assert figures["brier"] == pytest.approx(sum(expected) / 4)
    assert [one["share"] for one in figures["bins"]] == [0.25, 0.25, 0.5] and figures["predictions"] == 4


def test_the_brier_score_of_two_classes_is_twice_that_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    of_one = torch.rand(200, generator=generator, dtype=torch.float64)
    labels = (torch.rand(200, generator=generator) < 0.5).long()
    figures = class_calibration(torch.stack([1 - of_one, of_one], 1).log(), labels)
    assert figures["brier"] == pytest.approx(2 * brier_score_loss(labels.numpy(), of_one.numpy()))


def test_labels_drawn_from_the_probabilities_are_calibrated_and_sharper_ones_are_not() -> None:
    torch.manual_seed(0)
    logits = torch.randn(50_000, 4) * 2
    labels = torch.multinomial(logits.softmax(-1), 1)[:, 0]
    assert class_calibration(logits.log_softmax(-1), labels)["ece"] < 0.01
    assert class_calibration((3 * logits).log_softmax(-1), labels)["ece"] > 0.1


def test_certain_predictions_fall_into_the_last_bin() -> None:
    figures = class_calibration(torch.tensor([[0.0, -torch.inf]]), torch.tensor([0]))
    assert (figures["ece"], figures["brier"]) == (0.0, 0.0)
    assert figures["bins"] == [{"share": 1.0, "accuracy": 1.0, "confidence": 1.0}] and BINS == 15


def test_tokens_are_those_of_the_supervised_positions() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    model = LlamaForCausalLM(config).eval()
    rows = [
        {"input_ids": [1, 5, 9, 7, 2], "labels": [-100, -100, 9, 7, 2], "weight": 1.0},
        {"input_ids": [1, 4, 3, 6, 8, 9, 2], "labels": [-100] * 5 + [9, 2], "weight": 0.5},
    ]
    expected = Calibration()
    for row in rows:
        with torch.no_grad():
            log_probs = model(torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
        labels = torch.tensor(row["labels"][1:])
        expected.add(log_probs[labels != -100], labels[labels != -100])
    figures = token_calibration(model, rows, 0, 2)
    assert figures["predictions"] == 5
    for name in ("ece", "brier"):
        assert figures[name] == pytest.approx(expected.figures()[name], abs=1e-6)
