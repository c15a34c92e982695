"""Limits that a first version's figures support."""

from pathlib import Path

import numpy
import pyarrow
import pytest
from pyarrow import parquet

from flows.errors import ParamsError, StageError
from flows.gate.gate import GateReport
from flows.gate.promote import Promotion
from flows.gate.proposal import Proposal, _rounded_down, as_yaml, first_limits, propose, write_limits
from flows.params import Params, load_params
from flows.paths import Paths

NO_LIMITS = {"min_loss_gain": None, "min_rouge_l_gain": None, "min_eos_rate": None}
GAIN = 1.0


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    """A project whose last run was evaluated on 200 rows: the adapter's loss is one nat lower, give or take."""
    paths = Paths(tmp_path)
    paths.evaluation.mkdir(parents=True)
    noise = numpy.random.default_rng(0).normal(0, 0.5, 200)
    base, answered = numpy.full(200, 4.0), 40
    columns = {
        "id": [f"row{n}" for n in range(200)],
        "weight": [10.0] * 200,
        "base_loss": base,
        "adapter_loss": base - GAIN + noise - noise.mean(),
        "base_ended": [float(n % 2) for n in range(answered)] + [None] * 160,
        "adapter_ended": [1.0] * answered + [None] * 160,
        "base_rouge_l": [0.2] * answered + [None] * 160,
        "adapter_rouge_l": [0.2 + 0.01 * (-1) ** n for n in range(answered)] + [None] * 160,
    }
    parquet.write_table(pyarrow.table(columns), paths.evaluation_rows)
    return paths


def params(**gate: float | None) -> Params:
    return Params.model_validate({"gate": NO_LIMITS | gate})


def test_half_of_what_is_certain(paths: Paths) -> None:
    loss, ended = propose(params(), paths)
    assert (loss.key, ended.key) == ("min_loss_gain", "min_eos_rate"), "ROUGE-L has gained nothing for certain"
    error = 0.5 / 200**0.5
    assert (GAIN - 3 * error) / 2 < loss.limit < (GAIN - error) / 2, "below half of the gain, by about 1.65 errors"
    assert 0.5 < ended.limit < 0.75, "between the base's half and half-way to all"
    assert loss.reason.startswith("gain 1.000 over the base on 200 rows, 95% lower bound 0.9")
    assert "on 40 rows" in ended.reason and ended.reason.endswith("half of it above the base's 0.500")


def test_a_high_confidence_is_not_shown_as_certainty(paths: Paths) -> None:
    rules = Params.model_validate({"gate": NO_LIMITS | {"champion": {"confidence": 0.995}}})
    assert ", 99.5% lower bound " in propose(rules, paths)[0].reason


def test_only_stricter_limits(paths: Paths) -> None:
    assert [one.key for one in propose(params(min_loss_gain=0.1), paths)] == ["min_loss_gain", "min_eos_rate"]
    assert propose(params(min_loss_gain=0.6, min_eos_rate=0.9), paths) == []


def test_a_few_rows_prove_nothing(paths: Paths) -> None:
    parquet.write_table(parquet.read_table(paths.evaluation_rows).slice(0, 3), paths.evaluation_rows)
    assert propose(params(), paths) == []


def test_accuracy_of_classes(paths: Paths) -> None:
    truth = ["a", "b"] * 50
    columns = {
        "id": [f"row{n}" for n in range(100)],
        "label": truth,
        "base_prediction": ["a"] * 100,
        "adapter_prediction": truth,
        "base_loss": [0.7] * 100,
        "adapter_loss": [0.7] * 100,
        "tokens": [5] * 100,
    }
    parquet.write_table(pyarrow.table(columns), paths.evaluation_rows)
    (accuracy,) = propose(params(), paths)
    assert accuracy.key == "min_accuracy" and 0.65 < accuracy.limit < 0.75


def test_without_an_evaluation(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="run `peftcore run`"):
        propose(params(), Paths(tmp_path))


@pytest.mark.parametrize(
    ("champion", "outcome", "some"),
    [(None, "promoted", True), (None, "already", True), (None, "refused", False), ("v0.1.0", "promoted", False)],
)
def test_only_the_first_champion_proposes(paths: Paths, champion: str | None, outcome: str, some: bool) -> None:
    promotion = Promotion("n", "v0.2.0", "champion", outcome, None, GateReport("v0.2.0", champion, ()))  # type: ignore
    assert bool(first_limits(params(), paths, promotion)) == some
    assert first_limits(params(), paths, None) == []


def test_the_lines_are_those_of_the_file(tmp_path: Path) -> None:
    proposals = [Proposal("min_loss_gain", 0.48, 0.0, "why"), Proposal("min_eos_rate", 0.7, None, "so")]
    assert as_yaml(proposals) == (
        "gate:\n  min_loss_gain: 0.48  # now 0; why\n  min_eos_rate: 0.7    # now no limit; so"
    )
    file = tmp_path / "params.yaml"
    before = "# mine\nproject: {name: a-b}\ngate:\n  min_loss_gain: 0.0       # low\n  stage: champion\n"
    file.write_text(before)
    write_limits(file, proposals)
    written = load_params(file).gate
    assert (written.min_loss_gain, written.min_eos_rate) == (0.48, 0.7)
    assert "# mine" in file.read_text() and "# low" in file.read_text()

    file.write_text("gate: [wrong]\n")
    with pytest.raises(ParamsError):
        write_limits(file, proposals)
    assert file.read_text() == "gate: [wrong]\n"


@pytest.mark.parametrize(("value", "rounded"), [(0.4789, 0.47), (0.0876, 0.087), (1.299, 1.2), (12.7, 12.0)])
def test_two_digits(value: float, rounded: float) -> None:
    assert _rounded_down(value) == rounded
