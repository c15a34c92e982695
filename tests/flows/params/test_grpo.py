"""Section `train.grpo`: rewards, their names and policies, and what the evaluation and the gate take from them."""

from pathlib import Path

import pytest
from params_texts import read, refusal


@pytest.mark.parametrize(
    ("text", "key", "message"),
    [
        ("", "rewards", "grpo learns from rewards; give at least one, such as"),
        ("rewards: []", "rewards", "grpo learns from rewards"),
        ("rewards: [token_f]", "rewards.0.scorer", "did you mean token_f1?"),
        ("rewards: [token_f1, {scorer: data/r.py:token_f1}]", "rewards.1.name", "two rewards have this name"),
        ("rewards: [{scorer: token_f1, on_error: skip}]", "rewards.0.on_error", "cannot be compared with its group"),
        ("rewards: [{scorer: token_f1, weight: .nan}]", "rewards.0.weight", "finite"),
        ("rewards: [{scorer: token_f1, name: reward}]", "rewards.0.name", "the sum of the rewards has this name"),
        ("rewards: [rouge_l]", "rewards.0.name", "every evaluation has this figure; give another name"),
        ("rewards: [token_f1], group_size: 1", "group_size", ""),
        ("rewards: [token_f1], temperature: 0", "temperature", ""),
        ("rewards: [token_f1], top_p: 0", "top_p", ""),
        ("rewards: [token_f1], epsilon: 1", "epsilon", ""),
        ("rewards: [token_f1], beta: -1", "beta", ""),
        ("rewards: [token_f1], iterations: 0", "iterations", ""),
        ("rewards: [token_f1], loss_type: ppo", "loss_type", ""),
    ],
)
def test_an_impossible_value_is_refused_by_its_key(tmp_path: Path, text: str, key: str, message: str) -> None:
    told = refusal(tmp_path, f"train: {{objective: grpo, grpo: {{{text}}}}}")
    assert told.startswith(f"params.yaml:1: train.grpo.{key}: ") and message in told


def test_rewards_are_scorers_of_the_evaluation_with_their_sum(tmp_path: Path) -> None:
    rewards = "[{scorer: data/r.py:short, weight: 0.5}, {scorer: rouge_l, name: overlap}]"
    params = read(
        tmp_path, f"train: {{objective: grpo, grpo: {{rewards: {rewards}}}}}\nevaluate: {{scorers: [length]}}"
    )
    assert [scorer.name for scorer in params.scorers] == ["length", "short", "overlap", "reward"]
    assert [reward.weight for reward in params.train.grpo.rewards] == [0.5, 1.0]
    other = read(tmp_path, f"train: {{grpo: {{rewards: {rewards}}}}}\nevaluate: {{scorers: [length]}}")
    assert [scorer.name for scorer in other.scorers] == ["length"], "rewards belong to grpo"


def test_a_scorer_and_a_reward_have_different_names(tmp_path: Path) -> None:
    text = "train: {objective: grpo, grpo: {rewards: [token_f1]}}\nevaluate: {scorers: [chrf, token_f1]}"
    assert "evaluate.scorers.1.name: " in refusal(tmp_path, text)
    text = "train: {objective: grpo, grpo: {rewards: [token_f1]}}\nevaluate: {scorers: [{scorer: chrf, name: reward}]}"
    assert "evaluate.scorers.0.name: " in refusal(tmp_path, text)


def test_rules_may_name_a_reward_or_the_sum(tmp_path: Path) -> None:
    train = "train: {objective: grpo, grpo: {rewards: [{scorer: data/r.py:short}]}}\n"
    read(tmp_path, train + "gate: {rules: [{metric: reward, gain: 0.1}, {metric: short, limit: 0.5}]}")
    told = refusal(tmp_path, train + "gate: {rules: [{metric: shrot, limit: 1}]}")
    assert "did you mean short?" in told
    told = refusal(tmp_path, train + "gate: {rules: [{metric: reward, direction: lower, limit: 1}]}")
    assert "reward is better if higher; give higher" in told
    assert "nothing computes it" in refusal(tmp_path, "gate: {rules: [{metric: reward, limit: 1}]}")


def test_grpo_needs_chats(tmp_path: Path) -> None:
    data = "data: {source: a.jsonl, kind: text, system_prompt: null}"
    told = refusal(tmp_path, f"train: {{objective: grpo, grpo: {{rewards: [token_f1]}}}}\n{data}")
    assert "train.objective grpo needs chat" in told
