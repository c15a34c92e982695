"""Translation of another tool's configuration by a table of rules, on a tool made for the test."""

from pathlib import Path

import pytest

from flows.errors import ParamsError
from flows.project.translation import Tool, Values, base_of, check_missing, never, translate

TOOL = Tool(
    name="Other",
    defaults={"rate": 3.0},
    rules={
        "model": base_of,
        "rate": "train.learning_rate",
        "schedule": ("train.schedule", {"flat": "constant"}),
        "noise": never("noise is not built"),
        "packing": lambda on, _: Values({"train.batching": "packed"}, "rows do not see each other") if on else {},
        "steps": lambda value, _: {"train.max_steps": value + 0},
    },
    sources={"base": ("model",), "data": ()},
    no_effect={r"log_\w+": "only what is logged"},
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.yaml"


def test_each_key_ends_in_one_of_four_places(file: Path) -> None:
    file.write_text("model: a/b\nschedule: flat\npacking: true\nlog_every: 5\nnoise: 0.1\nunheard: 3\noff: false\n")
    done = translate(TOOL, file)
    assert done.project == {"base": "hub:a/b"}
    assert done.values == {"train.learning_rate": 3.0, "train.schedule": "constant", "train.batching": "packed"}
    assert list(done.keys) == ["model", "schedule", "packing"]  # the tool's default is no key of the file
    assert done.notes == {"packing": "rows do not see each other"}
    assert done.without_effect == {"log_every": "only what is logged"}
    assert done.missing == {"noise": "noise is not built", "unheard": "this key is not known here"}


def test_a_misspelt_key_and_a_value_without_counterpart_are_missing(file: Path) -> None:
    file.write_text("scheduel: flat\nschedule: wavy\n")
    assert translate(TOOL, file).missing == {
        "scheduel": "did you mean schedule?",
        "schedule": "'wavy'; flat have one",
    }


def test_a_folder_is_a_base_and_a_given_base_replaces_the_files(file: Path) -> None:
    (file.parent / "model").mkdir()
    file.write_text("model: model\n")
    assert translate(TOOL, file).project == {"base": f"path:{file.parent / 'model'}"}
    done = translate(TOOL, file, given=["base"])
    assert not done.project and done.without_effect == {"model": "another one is given"}


def test_what_is_missing_must_be_left_out_by_name(file: Path) -> None:
    file.write_text("noise: 0.1\nunheard: 3\n")
    done = translate(TOOL, file)
    with pytest.raises(ParamsError, match=r"noise: noise is not built[\s\S]*--leave-out noise --leave-out unheard"):
        check_missing(TOOL, file, done, [])
    with pytest.raises(ParamsError, match=r"--leave-out unheard$"):
        check_missing(TOOL, file, done, ["noise"])
    with pytest.raises(ParamsError, match="--leave-out rate: "):
        check_missing(TOOL, file, done, ["noise", "unheard", "rate"])
    check_missing(TOOL, file, done, ["noise", "unheard"])


@pytest.mark.parametrize(
    ("text", "said"),
    [("- a\n- b\n", "must be a mapping"), ("a: [\n", "is no YAML"), ("steps: many\n", "steps: 'many' cannot be read")],
)
def test_a_file_that_cannot_be_read_is_named(text: str, said: str, file: Path) -> None:
    file.write_text(text)
    with pytest.raises(ParamsError, match=said) as error:
        translate(TOOL, file)
    assert str(file) in str(error.value)


def test_a_missing_file_is_an_error(file: Path) -> None:
    with pytest.raises(ParamsError, match="cannot be read"):
        translate(TOOL, file)
