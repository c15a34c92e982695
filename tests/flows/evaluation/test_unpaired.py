"""Unpaired preferences: rewards and margins by hand from log-probabilities of whole forward passes."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from flows.data.encoders import UnpairedPreferenceEncoder
from flows.data.examples import UnpairedPreference
from flows.data.rows import Row
from flows.errors import StageError
from flows.evaluation.unpaired import evaluate_unpaired
from flows.params import Params
from flows.stages.reevaluate import adapter_values
from peftcore.train import mismatched_answers

TEXTS = [
    ("One?", "1.", True),
    ("Two?", "I do not know.", False),
    ("Three?", "That is 3.", True),
    ("Four?", "no", False),
]
KTO: dict[str, Any] = {"objective": "kto", "kto": {"beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 0.5}}


@pytest.fixture
def rows(tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    encoder = UnpairedPreferenceEncoder(tokenizer)
    made = []
    for question, answer, desirable in TEXTS:
        turns = [{"role": "user", "content": question}], [{"role": "assistant", "content": answer}]
        tokens = encoder.encode(UnpairedPreference(*turns, desirable, group="g", slice="all", where="here"))
        made.append(tokens.columns() | {"id": tokens.id, "slice": "all", "weight": 1.0})
    return made


@pytest.fixture
def params(answering: Callable[..., Params]) -> Params:
    return answering(train=KTO, data={"source": "rows.jsonl", "kind": "unpaired_preference"})


@torch.no_grad()
def log_probs(model: Any, rows: list[dict[str, Any]]) -> list[float]:
    """Log-probability of each answer's supervised tokens in nats."""
    values = []
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        by_token = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        values.append(by_token[labels != -100].sum().item())
    return values


def ratios(model: Any, rows: list[dict[str, Any]]) -> list[float]:
    policy = log_probs(model, rows)
    with model.disable_adapter():
        reference = log_probs(model, rows)
    return [one - other for one, other in zip(policy, reference, strict=True)]


def test_losses_and_rewards_compare_the_adapter_with_its_base(
    adapted: Any, tokenizer: PreTrainedTokenizerBase, rows: list[Row], params: Params
) -> None:
    result = evaluate_unpaired(params, adapted, tokenizer, rows)
    table, base, adapter = result.table.to_pylist(), result.metrics["base"], result.metrics["adapter"]
    longest = max(len(row["input_ids"]) for row in rows)
    point = max(0.0, sum(ratios(adapted, mismatched_answers(rows, longest))) / len(rows))
    assert adapter["kl"] == pytest.approx(point, abs=1e-9)
    for line, ratio, (_, _, desirable) in zip(table, ratios(adapted, rows), TEXTS, strict=True):
        margin = ratio - point if desirable else point - ratio
        loss = (1.5 if desirable else 0.5) * (1 - 1 / (1 + math.exp(-0.5 * margin)))
        assert line["reward"] == pytest.approx(0.5 * ratio)
        assert (line["base_margin"], line["base_accuracy"]) == (0.0, 0.5)
        assert line["adapter_margin"] == pytest.approx(margin)
        assert line["adapter_accuracy"] == float(margin > 0)
        assert line["adapter_loss"] == pytest.approx(loss)
        assert line["base_loss"] == pytest.approx(0.75 if desirable else 0.25)
    assert base["accuracy"] == 0.5 and base["loss"] == pytest.approx(0.5)
    good, bad = ([line["reward"] for line in table if line["desirable"] is mark] for mark in (True, False))
    assert adapter["reward_desirable"] == pytest.approx(sum(good) / 2)
    assert adapter["reward_undesirable"] == pytest.approx(sum(bad) / 2)


def test_only_prompts_of_good_answers_are_answered(
    adapted: Any, tokenizer: PreTrainedTokenizerBase, rows: list[Row], params: Params
) -> None:
    result = evaluate_unpaired(params, adapted, tokenizer, rows)
    answered = [line["reference"] for line in result.table.to_pylist() if line["reference"]]
    assert answered == ["1.", "That is 3."]
    with pytest.raises(StageError, match="none of the 2 test rows is desirable"):
        evaluate_unpaired(params, adapted, tokenizer, [row for row in rows if not row["desirable"]])


def test_a_second_evaluation_gives_the_same_values(
    adapted: Any, tokenizer: PreTrainedTokenizerBase, rows: list[Row], params: Params
) -> None:
    table = evaluate_unpaired(params, adapted, tokenizer, rows).table.to_pylist()
    losses, columns = adapter_values(params, adapted, rows, 0)
    assert losses.means == pytest.approx([line["adapter_loss"] for line in table])
    assert losses.tokens == [line["tokens"] for line in table]
    for name in ("adapter_margin", "adapter_accuracy"):
        assert columns[name] == pytest.approx([line[name] for line in table])
