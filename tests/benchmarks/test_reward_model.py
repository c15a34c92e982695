"""The benchmark of reward models on a tiny base: its rows, its stages, best-of-n, its table."""

import json
from pathlib import Path

import pytest

from benchmarks.reward_model import preferences
from flows.data.docstrings import Pair

SMALL = {
    "data": {"train_rows": 16, "validation_rows": 4, "test_rows": 8, "max_length": 1024},
    "method": {"r": 2},
    "train": {"max_steps": 2, "batch_size": 2, "evaluations": 1},
    "evaluate": {"rows": 8, "generate_rows": 2, "max_new_tokens": 2, "samples": 1},
    "merge": {"rows": 2, "max_kl": 9.0, "min_top1_agreement": 0.0},
}


def test_half_of_the_rejected_answers_are_another_functions_and_half_are_truncated() -> None:
    library = [Pair(f"def f{n}(): ...", f"Return the number {n} as text.", f"m{n}", n) for n in range(40)]
    rows = preferences(library)
    assert all(row["chosen"] != row["rejected"] for row in rows)
    truncated = [row for row in rows if row["rejected_is"] == "truncated"]
    assert len(truncated) == 20 and {row["rejected"] for row in truncated} == {"Return the number"}
    summaries = {pair.summary for pair in library}
    assert all(row["rejected"] in summaries for row in rows if row["rejected_is"] != "truncated")


@pytest.mark.proof
def test_a_reward_model_is_trained_and_chooses_answers(run_benchmark, tmp_path: Path, tiny_base: Path) -> None:
    options = ("--base", str(tiny_base), "--folder", str(tmp_path), "--params", json.dumps(SMALL))
    done = run_benchmark("reward_model", *options, "--prompts", "2", "--answers", "3")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "reward_model.json").read_text())
    assert result["steps"] == 2 and sum(one["rows"] for one in result["accuracies"].values()) == 8
    assert [one["n"] for one in result["best_of_n"]] == [1, 2, 3]
    rewards = [one["reward"] for one in result["best_of_n"]]
    assert rewards == sorted(rewards)
    assert "| rejected: truncated |" in done.stdout
