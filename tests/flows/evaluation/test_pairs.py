"""Pairs: margins by hand from log-probabilities of whole forward passes; rewards compare with the base."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from flows.data.encoders import PreferenceEncoder
from flows.data.examples import Preference
from flows.data.rows import Row
from flows.evaluation.pairs import evaluate_pairs
from flows.params import Params

TEXTS = [("One?", "1.", "I do not know."), ("Two?", "That is 2.", "no"), ("Three?", "3", "4")]
DPO: dict[str, Any] = {"objective": "dpo", "preference": {"beta": 0.5}}


@pytest.fixture
def rows(tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    encoder = PreferenceEncoder(tokenizer)
    made = []
    for question, *answers in TEXTS:
        chosen, rejected = ([{"role": "assistant", "content": answer}] for answer in answers)
        prompt = [{"role": "user", "content": question}]
        tokens = encoder.encode(Preference(prompt, chosen, rejected, group="g", slice="all", where="here"))
        made.append(tokens.columns() | {"id": tokens.id, "slice": "all", "weight": 1.0})
    return made


@pytest.fixture
def evaluated(
    adapted: Any, tokenizer: PreTrainedTokenizerBase, rows: list[Row], answering: Callable[..., Params]
) -> Callable[[dict[str, Any]], Any]:
    """`evaluated(DPO)`: the result for this section `train`."""

    def evaluate(train: dict[str, Any]) -> Any:
        params = answering(train=train, data={"source": "rows.jsonl", "kind": "preference"})
        return evaluate_pairs(params, adapted, tokenizer, rows)

    return evaluate


@torch.no_grad()
def log_probs(model: Any, row: Row, answer: str) -> tuple[float, int]:
    """Log-probability of an answer's supervised tokens in nats, and their number."""
    ids, labels = torch.tensor([row[f"{answer}_input_ids"]]), torch.tensor(row[f"{answer}_labels"])[1:]
    by_token = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return by_token[labels != -100].sum().item(), int((labels != -100).sum())


def margins(model: Any, rows: list[Row], per_token: bool) -> list[float]:
    values = []
    for row in rows:
        (chosen, n), (rejected, m) = (log_probs(model, row, answer) for answer in ("chosen", "rejected"))
        values.append(chosen / n - rejected / m if per_token else chosen - rejected)
    return values


@pytest.mark.parametrize(
    ("train", "per_token"),
    [
        (DPO, False),
        ({"objective": "dpo", "preference": {"length_normalized": True}}, True),
        ({"objective": "dpo", "preference": {"loss": "ipo"}}, True),
        ({"objective": "orpo"}, True),
        ({"objective": "simpo"}, True),
    ],
)
def test_margins_are_sums_or_means_as_the_objective_compares_answers(
    adapted: Any, rows: list[Row], evaluated: Callable[..., Any], train: dict[str, Any], per_token: bool
) -> None:
    result = evaluated(train)
    told = result.table.to_pylist()
    expected = {"adapter": margins(adapted, rows, per_token)}
    with adapted.disable_adapter():
        expected["base"] = margins(adapted, rows, per_token)
    for name, values in expected.items():
        assert [line[f"{name}_margin"] for line in told] == pytest.approx(values, rel=1e-6)
        assert result.metrics[name]["margin"] == pytest.approx(sum(values) / len(values), rel=1e-6)
        assert result.metrics[name]["accuracy"] == pytest.approx(sum(value > 0 for value in values) / len(values))


def test_the_base_is_the_reference_of_dpo(evaluated: Callable[..., Any]) -> None:
    result = evaluated(DPO)
    told, base, adapter = result.table.to_pylist(), result.metrics["base"], result.metrics["adapter"]
    assert base["loss"] == pytest.approx(math.log(2)), "-log sigmoid(0)"
    rewards = [0.5 * (line["adapter_margin"] - line["base_margin"]) for line in told]
    assert [line["reward_margin"] for line in told] == pytest.approx(rewards)
    assert [line["adapter_loss"] for line in told] == pytest.approx([math.log1p(math.exp(-one)) for one in rewards])
    assert adapter["reward_margin"] == pytest.approx(sum(rewards) / 3)
    assert adapter["reward_accuracy"] == pytest.approx(sum(one > 0 for one in rewards) / 3)
    assert "reward_margin" not in base


def test_orpo_has_no_reference_and_no_rewards_of_the_adapter(evaluated: Callable[..., Any]) -> None:
    metrics = evaluated({"objective": "orpo"}).metrics
    assert not {"reward_accuracy", "reward_margin"} & metrics["adapter"].keys()


def test_answers_are_compared_with_the_chosen_ones(rows: list[Row], evaluated: Callable[..., Any]) -> None:
    result = evaluated(DPO)
    answered = [line for line in result.table.to_pylist() if line["reference"]]
    chosen = {row["id"]: row["chosen"] for row in rows}
    assert len(answered) == 2 and all(line["reference"] == chosen[line["id"]] for line in answered)
    lengths = {row["id"]: len(row["chosen_input_ids"]) - row["prompt_length"] for row in rows}
    longer = sum(lengths[line["id"]] > 3 for line in answered) / 2
    assert result.metrics["answers"] == {"max_new_tokens": 3, "longer_known_answers": longer}
