"""Rewards as scorers with their sum, and as functions for training."""

from pathlib import Path
from typing import Any

import pytest

from flows.errors import StageError
from flows.evaluation.scorers.rewards import load_scorers, training_rewards, with_default
from flows.params import Grpo, Reward, RewardSum, Scorer

CODE = """\
calls = []

def words(prompt, answer, reference, row, factor=1):
    calls.append(answer)
    return factor * len(answer.split())

def unit(prompt, answer, reference, row):
    return float(answer == reference + row["unit"])

def failing(prompt, answer, reference, row):
    return {"": float("nan"), "a": 1.0}[answer]
"""
ROW = {"id": "r1", "prompt": "How far?", "completion": "3", "input_ids": [1, 2], "extra": '{"unit": " km"}'}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "r.py").write_text(CODE)
    return tmp_path


def reward(name: str, **options: Any) -> Reward:
    return Reward.model_validate({"scorer": f"data/r.py:{name}", **options})


def test_the_sum_is_a_scorer_beside_its_rewards(root: Path) -> None:
    grpo = Grpo(rewards=[reward("words", options={"factor": 2}), reward("unit", weight=-0.5)])
    loaded = load_scorers([Scorer(scorer="exact_match"), *grpo.scorers], root)
    assert list(loaded) == ["exact_match", "words", "unit", "reward"]
    row = {"id": "r1", "unit": " km"}
    values = {name: score("How far?", "3 km", "3", row) for name, (_, score) in loaded.items()}
    assert values == {"exact_match": 0.0, "words": 4, "unit": 1.0, "reward": 3.5}


def test_a_reward_is_computed_once_for_its_column_and_the_sum(root: Path) -> None:
    loaded = load_scorers(Grpo(rewards=[reward("words")]).scorers, root)
    for _, score in loaded.values():
        assert score("", "a b", "", {"id": "r1"}) == 2
    calls = loaded["words"][1].__closure__
    assert calls is not None and any(cell.cell_contents == {("r1", "a b"): 2} for cell in calls)
    assert loaded["reward"][1]("", "a b c", "", {"id": "r1"}) == 3


def test_training_calls_a_reward_as_the_evaluation_does(root: Path) -> None:
    functions = training_rewards([reward("unit"), reward("words")], root)
    assert functions["unit"](ROW, "3 km") == 1.0 and functions["unit"](ROW, "3") == 0.0
    assert functions["words"](ROW, "3 km") == 2


def test_an_answer_on_which_a_reward_fails_gets_the_default(root: Path) -> None:
    (score,) = training_rewards([reward("failing", on_error=-1.0)], root).values()
    assert (score(ROW, "a"), score(ROW, ""), score(ROW, "b")) == (1.0, -1.0, -1.0)
    (strict,) = training_rewards([reward("failing")], root).values()
    with pytest.raises(KeyError):
        strict(ROW, "b")
    kept = with_default(reward("failing"), strict)  # type: ignore[arg-type]
    assert kept is strict, "stop is the trainer's"


def test_a_missing_function_names_the_section(root: Path) -> None:
    with pytest.raises(StageError, match=r"train\.grpo\.rewards, unti: data/r\.py has no function unti; did you mean"):
        training_rewards([reward("unti")], root)


def test_sums_are_compared_by_rewards_weights_and_files(root: Path) -> None:
    def identity(*rewards: Reward) -> dict[str, Any]:
        return RewardSum(rewards=list(rewards)).identity(root)

    assert identity(reward("words")) == identity(reward("words"))
    others = [reward("words", weight=2.0), reward("words", options={"factor": 2}), reward("unit")]
    assert all(identity(other) != identity(reward("words")) for other in others)
    before = identity(reward("words"))
    (root / "data" / "r.py").write_text(CODE + "\n")
    assert identity(reward("words")) != before
