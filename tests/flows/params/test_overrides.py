"""Other values for keys of params.yaml: read as DVC reads them, and refused before anything runs."""

from pathlib import Path

import pytest

from flows.errors import ParamsError
from flows.params import load_params
from flows.params.overrides import apply_overrides, check_overrides, parameter_sets
from flows.scaling.experiment import run_experiment

TEXT = "# kept\nproject: {name: docstrings}\ntrain: {batch_size: 8}\n"


@pytest.fixture
def params(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(TEXT)
    return path


def test_the_grid_is_every_combination() -> None:
    assert parameter_sets(["a.b=1,2", "c=x"]) == [("a.b=1", "c=x"), ("a.b=2", "c=x")]
    assert parameter_sets(["r=range(1,4)"]) == [("r=1",), ("r=2",), ("r=3",)]
    with pytest.raises(ParamsError, match="give key=value1,value2"):
        parameter_sets(["no equals sign"])


def test_values_are_set_whether_the_file_has_them_or_not(params: Path) -> None:
    apply_overrides(params, ["train.batch_size=4", "train.learning_rate=1e-3", "method.target_modules=[q_proj,v_proj]"])
    read = load_params(params)
    assert (read.train.batch_size, read.train.learning_rate) == (4, 1e-3)
    assert read.method.target_modules == ["q_proj", "v_proj"]
    assert params.read_text().startswith("# kept\n")


REFUSED = [
    ("train.batch_size=0", "train.batch_size: 0 does not fit"),
    ("train.bach_size=4", "bach_size"),
    ("train.batch_size.low=4", "batch_size"),
    ("train=5", "give a section"),
    ("train.batch_size", "give KEY=VALUE"),
    ("=4", "unknown key"),
    ("train.batch_size=[4", "give KEY=VALUE"),
    ("train.batch_size=2,4", "give KEY=VALUE"),
]


@pytest.mark.parametrize(("override", "told"), REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_changed(params: Path, override: str, told: str) -> None:
    with pytest.raises(ParamsError, match=told):
        check_overrides(params, ("train.batch_size=4",), (override,))
    assert params.read_text() == TEXT
    with pytest.raises(ParamsError, match=told):
        run_experiment(params.parent, [override])  # a folder without git or DVC: nothing was started in it
    assert sorted(path.name for path in params.parent.iterdir()) == ["params.yaml"]
