"""What `peftcore doctor` says of rewards that fail, that are always equal, or that like empty answers."""

from pathlib import Path
from typing import Any

import pytest

from flows.errors import StageError
from flows.evaluation.reward_check import ROWS, reward_findings
from flows.params import Reward
from flows.validation.findings import Finding

CODE = """\
def full_stop(prompt, answer, reference, row):
    return float(answer.endswith("."))

def short(prompt, answer, reference, row):
    return float(len(answer) < 50)

def shortest(prompt, answer, reference, row):
    return -len(answer)

def broken(prompt, answer, reference, row):
    return 1 / len(answer)
"""
EXAMPLES = [{"id": f"r{n}", "prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(3 * ROWS)]


@pytest.fixture
def findings(tmp_path: Path) -> Any:
    """`findings("full_stop", short={"weight": 2})`: {check: finding} of these rewards."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rewards.py").write_text(CODE)

    def find(*names: str, **options: Any) -> dict[str, Finding]:
        entries = {name: {} for name in names} | options
        rewards = [
            Reward.model_validate({"scorer": f"data/rewards.py:{name}", **given}) for name, given in entries.items()
        ]
        return {finding.check: finding for finding in reward_findings(rewards, EXAMPLES, tmp_path)}

    return find


def test_a_reward_that_tells_answers_apart_is_well(findings: Any) -> None:
    found = findings("full_stop")
    assert [finding.severity for finding in found.values()] == ["ok", "ok"]
    assert found["reward full_stop"].figure == "0 to 1, mean of the references 1"
    assert found["sum of rewards"].figure == "references get 1, empty answers 0"


def test_a_reward_that_is_always_equal_is_a_warning(findings: Any) -> None:
    found = findings("short")
    assert found["reward short"].severity == "warning" and "nothing is learned" in found["reward short"].fix


def test_a_sum_that_likes_empty_answers_is_a_warning(findings: Any) -> None:
    found = findings("shortest", full_stop={"weight": 0.1})
    assert found["reward shortest"].severity == "ok"
    assert found["sum of rewards"].severity == "warning" and found["sum of rewards"].value < 0
    assert findings("shortest", full_stop={"weight": 100.0})["sum of rewards"].severity == "ok"


def test_a_failing_reward_is_an_error_unless_it_has_a_default(findings: Any) -> None:
    found = findings("broken", "full_stop")
    assert found["reward broken"].severity == "error"
    assert f"failed on {ROWS} answers, first on row r0, answer '': ZeroDivisionError" in found["reward broken"].figure
    assert "sum of rewards" not in found
    assert findings("full_stop", broken={"on_error": -1.0})["reward broken"].severity == "ok"


def test_an_unknown_function_is_refused_by_name(findings: Any) -> None:
    with pytest.raises(StageError, match="did you mean full_stop"):
        findings("full_stp")
