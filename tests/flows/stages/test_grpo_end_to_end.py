"""Generated answers and their rewards through the stages: prepared, trained, resumed, evaluated, merged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest

from flows.errors import StageError
from flows.gate.rows import row_values
from flows.params import Params
from flows.paths import Paths
from flows.stages import evaluate, merge, prepare, train
from flows.stages.reevaluate import measure
from flows.training.callbacks import WriteLog
from peftcore import TrainingError

pytestmark = pytest.mark.slow

REWARDS = """\
def length(prompt, answer, reference, row, limit=20):
    assert row["prompt"] == prompt and row["completion"] == reference and "input_ids" not in row
    return len(answer) / limit

def known(prompt, answer, reference, row):
    return float(row["weight_of_row"] == 1 and reference in answer)

def broken(prompt, answer, reference, row):
    raise KeyError("unit")
"""
CHARACTERS = {"scorer": "length", "name": "characters", "options": {"unit": "characters"}}
GRPO: dict[str, Any] = {
    "rewards": [
        {"scorer": "data/rewards.py:length", "options": {"limit": 10}},
        {"scorer": "data/rewards.py:known", "weight": 2.0},
    ],
    "group_size": 3,
    "max_new_tokens": 6,
    "beta": 0.1,
}


@pytest.fixture
def made(tmp_path: Path, tiny_base: Path, tiny_params: Callable[..., Params]) -> Callable[..., tuple[Params, Paths]]:
    """`made(grpo, train)`: parameters with these options, and prepared rows."""

    def make(grpo: dict[str, Any] | None = None, **options: Any) -> tuple[Params, Paths]:
        rows = [
            {"prompt": f"How much is {n} and 1?", "completion": f"{n + 1}.", "book": f"b{n // 4}", "weight_of_row": 1}
            for n in range(100)
        ]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / "rewards.py").write_text(REWARDS)
        options = {"objective": "grpo", "max_steps": 4, "evaluations": 2, "grpo": GRPO | (grpo or {})} | options
        data = {"near_duplicates": "keep", "extra_columns": ["weight_of_row"]}
        params = tiny_params(data=data, train=options, evaluate={"scorers": [CHARACTERS], "latency_rows": 0})
        prepare.run(params, Paths(tmp_path))
        return params, Paths(tmp_path)

    return make


def log_of(paths: Paths) -> list[dict[str, Any]]:
    return [json.loads(line) for line in paths.training_log.read_text().splitlines()]


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    times = ("seconds", "tokens_per_second", "peak_memory")
    return [{name: value for name, value in record.items() if name not in times} for record in records]


def test_answers_are_rewarded_trained_evaluated_and_merged(made: Callable[..., tuple[Params, Paths]]) -> None:
    params, paths = made()
    assert set(json.loads(paths.rewards.read_text())) == {"length", "known"}
    train.run(params, paths)
    log = log_of(paths)
    steps = [record for record in log if record["loss"] is not None]
    for record in steps:
        assert all(record[name] is not None for name in ("reward", "reward_deviation", "equal_groups", "kl"))
        assert 0 < record["answer_tokens"] <= 6 and 0 <= record["eos_rate"] <= 1
    evaluations = [record for record in log if record["validation_loss"] is not None]
    assert len(steps) == 4 and len(evaluations) == 2
    for record in evaluations:
        assert record["validation_loss"] == pytest.approx(-record["reward"])
    evaluate.run(params, paths)
    metrics = json.loads(paths.evaluation_metrics.read_text())
    rows = parquet.read_table(paths.evaluation_rows).to_pylist()
    assert metrics["loss_function"] == "cross entropy of tokens" and metrics["objective"] == "grpo"
    assert {"length", "known", "reward", "characters", "rouge_l", "ended"} < metrics["adapter"].keys()
    answered = [row for row in rows if row["adapter_answer"] is not None]
    assert len(answered) == 6
    for row in answered:
        for side in ("base", "adapter"):
            assert row[f"{side}_length"] == len(row[f"{side}_answer"]) / 10
            assert row[f"{side}_reward"] == pytest.approx(row[f"{side}_length"] + 2 * row[f"{side}_known"])
    assert metrics["gain"]["reward"] == pytest.approx(metrics["adapter"]["reward"] - metrics["base"]["reward"])
    assert metrics["scorers"]["reward"]["rewards"]["known"]["weight"] == 2.0
    places = {"base": str(paths.base), "adapter": str(paths.adapter), "test": str(paths.split("test"))}
    task = {"version": "v0.1.0", "params": params.model_dump(), "rows": len(rows), "labels": None, **places}
    task |= {"metrics": ["reward"], "answered": [row["id"] for row in answered], "max_new_tokens": 8}
    again = measure(task | {"root": str(paths.root)})
    assert row_values(again, "reward") == [row["adapter_reward"] for row in rows]
    assert [row["adapter_loss"] for row in again.to_pylist()] == pytest.approx([row["adapter_loss"] for row in rows])
    merge.run(params, paths)
    assert json.loads(paths.merge_report.read_text())["tokens"] > 0


@pytest.mark.parametrize("iterations", [1, 2])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    made: Callable[..., tuple[Params, Paths]], monkeypatch: pytest.MonkeyPatch, iterations: int
) -> None:
    params, paths = made({"iterations": iterations}, max_steps=5, evaluations=5)
    train.run(params, paths)
    whole = (paths.adapter / "adapter_model.safetensors").read_bytes(), without_times(log_of(paths))

    class Killed(BaseException):
        pass

    def die(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(WriteLog, "on_step_end", die)
        with pytest.raises(Killed):
            train.run(params, paths)
    assert list(paths.checkpoints.rglob("checkpoint-3"))
    train.run(params, paths)
    assert without_times(log_of(paths)) == whole[1]
    assert (paths.adapter / "adapter_model.safetensors").read_bytes() == whole[0]


def test_a_changed_reward_is_another_run(made: Callable[..., tuple[Params, Paths]]) -> None:
    params, paths = made()
    before = paths.rewards.read_bytes()
    (paths.root / "data" / "rewards.py").write_text(REWARDS + "\n")
    prepare.run(params, paths)
    assert paths.rewards.read_bytes() != before, "the train stage depends on this file"


def test_a_failing_reward_stops_the_run_unless_it_has_a_default(made: Callable[..., tuple[Params, Paths]]) -> None:
    params, paths = made({"rewards": [{"scorer": "data/rewards.py:broken"}]})
    with pytest.raises(TrainingError, match=r"the reward broken failed on row .* KeyError: 'unit'; mend it"):
        train.run(params, paths)
    params, paths = made({"rewards": [{"scorer": "data/rewards.py:broken", "on_error": -1.0}, GRPO["rewards"][0]]})
    train.run(params, paths)
    assert all(record["reward"] is not None for record in log_of(paths))


def test_what_grpo_cannot_do_is_refused(made: Callable[..., tuple[Params, Paths]]) -> None:
    params, paths = made(batching="packed")
    with pytest.raises(StageError, match="batching is packed, and grpo needs its rows one by one"):
        train.run(params, paths)
    params, paths = made({"rewards": [{"scorer": "data/rewards.py:lenght"}]})
    with pytest.raises(
        StageError, match=r"train\.grpo\.rewards, lenght: .* has no function lenght; did you mean length"
    ):
        train.run(params, paths)
