"""Rewards of pairs: figures by hand from the rewards of each answer alone, against a base of equal rewards."""

import math
from collections.abc import Callable
from typing import Any

import pyarrow
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerBase

from flows.data.encoders import PreferenceEncoder
from flows.data.examples import Preference
from flows.data.rows import Row
from flows.errors import StageError
from flows.evaluation.rewards import check_finite, evaluate_rewards, reward_accuracies
from flows.gate.rows import row_values
from flows.params import Params
from flows.stages.reevaluate import adapter_values

PAIRS = [("One?", "1.", "I do not know.", 0.0), ("Two?", "That is 2.", "3", 0.5), ("Three?", "3", "4", 1.0)]


@pytest.fixture
def rows(tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    encoder = PreferenceEncoder(tokenizer)
    made = []
    for number, (question, chosen, rejected, margin) in enumerate(PAIRS):
        turns = [{"role": "user", "content": question}]
        answers = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
        example = Preference(turns, answers[0], answers[1], margin=margin, group="g", slice=f"s{number % 2}", where="")
        tokens = encoder.encode(example)
        made.append(tokens.columns() | {"id": tokens.id, "slice": f"s{number % 2}", "weight": 1.0 + number})
    return made


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerBase) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_labels=1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForSequenceClassification(config).double().eval()


@pytest.fixture
def params(answering: Callable[..., Params]) -> Params:
    train = {"objective": "reward", "reward": {"center_rewards_coefficient": 0.1}}
    data = {"source": "rows.jsonl", "kind": "preference", "margin_column": "margin"}
    return answering(train=train, data=data)


@torch.no_grad()
def alone(model: Any, rows: list[Row], side: str) -> list[float]:
    return [model(torch.tensor([row[f"{side}_input_ids"]])).logits.item() for row in rows]


def test_figures_follow_from_the_rewards_of_each_answer(
    params: Params, model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[Row]
) -> None:
    result = evaluate_rewards(params, model, tokenizer, rows)
    chosen, rejected = (alone(model, rows, side) for side in ("chosen", "rejected"))
    base, adapter, table = result.metrics["base"], result.metrics["adapter"], result.table.to_pylist()
    losses, weights = [], [row["weight"] for row in rows]
    for row, found, one, other in zip(rows, table, chosen, rejected, strict=True):
        assert (found["chosen_reward"], found["rejected_reward"]) == pytest.approx((one, other))
        losses.append(math.log1p(math.exp(row["margin"] - (one - other))) + 0.1 * (one + other) ** 2)
        assert found["adapter_loss"] == pytest.approx(losses[-1])
        assert found["base_loss"] == pytest.approx(math.log1p(math.exp(row["margin"])))
        assert found["adapter_accuracy"] == float(one > other) and found["base_accuracy"] == 0.5
    total = sum(loss * weight for loss, weight in zip(losses, weights, strict=True))
    assert adapter["loss"] == pytest.approx(total / sum(weights))
    assert adapter["margin"] == pytest.approx(sum(chosen) / 3 - sum(rejected) / 3)
    assert adapter["chosen_reward"] == pytest.approx(sum(chosen) / 3)
    assert (base["accuracy"], base["margin"]) == (0.5, 0.0)
    assert result.metrics["baseline"] == "equal rewards for all answers"
    assert result.metrics["gain"]["loss"] == pytest.approx(base["loss"] - adapter["loss"])
    assert {name: one["rows"] for name, one in result.metrics["slices"].items()} == {"s0": 2, "s1": 1}
    assert [sample["reference"] for sample in result.samples] == ["1."]


def test_the_gate_and_a_re_evaluation_have_the_same_values_for_each_row(
    params: Params, model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[Row]
) -> None:
    table = evaluate_rewards(params, model, tokenizer, rows).table
    assert tokenizer.pad_token_id is not None
    losses, columns = adapter_values(params, model, rows, int(tokenizer.pad_token_id))
    assert losses.means == pytest.approx(row_values(table, "loss"))
    again = pyarrow.table(columns)
    for metric in ("accuracy", "margin"):
        assert row_values(again, metric) == pytest.approx(row_values(table, metric)), metric


def test_a_tie_is_half_right() -> None:
    assert reward_accuracies(torch.tensor([2.0, 0.0, -0.1])).tolist() == [1.0, 0.5, 0.0]


def test_a_reward_that_is_not_finite_names_its_row(rows: list[Row]) -> None:
    with pytest.raises(StageError, match=rf"1 of 3 pairs .* first row {rows[1]['id']} with 1 and nan"):
        check_finite(rows, torch.tensor([[0.0, 1.0, 2.0], [0.0, torch.nan, 0.0]]))
