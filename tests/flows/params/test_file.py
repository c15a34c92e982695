"""What is said of a wrong params.yaml: the line, what was given, what fits, a suggestion; all of it at once."""

from pathlib import Path

import pytest
from params_texts import refusal

from flows.errors import ParamsError
from flows.params import load_params


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data:\n  max_lenght: 5\n", "2: data.max_lenght: unknown key; did you mean max_length?"),
        ("train:\n\n  epochs: '2'\n", "3: train.epochs: '2' does not fit; give a number, without quotes: 2"),
        ("data: {max_length: 2.5}", "1: data.max_length: 2.5 does not fit; give a whole number"),
        ("quantization: {double_quant: 1}", "1: quantization.double_quant: 1 does not fit; give true or false"),
        ("method:\n  name: lorra", "2: method.name: 'lorra' does not fit; did you mean lora?"),
        ("merge: {into: x}", "1: merge.into: 'x' does not fit; give one of best, dequantized, original, requantized"),
        (
            "method: {lora_dropout: 1}",
            "1: method.lora_dropout: 1 does not fit; give a number of at least 0 and below 1",
        ),
        ("gate: 5", "1: gate: 5 does not fit; give a section: keys, indented below it"),
        ("gate: null", "1: gate: nothing (null) does not fit; give a section: keys, indented below it"),
        ("method:\n  r: 8\n  r: 9\n", "3: method.r: given before, in line 2; remove one"),
        ("register: {remote: ''}", "1: register.remote: '' does not fit; give text that is not empty"),
        (
            "retrain:\n  true: data\n",
            "2: retrain.true: unknown key; write on (PyYAML reads on as true, ruamel.yaml does not)",
        ),
        ("data:\n  5: x\n", "2: data.5: the key is no text; write a name"),
        (
            "data:\n<<<<<<< HEAD\n  max_length: 5\n=======\n  max_length: 6\n>>>>>>> other\n",
            "2: a merge conflict of git begins here; keep one of its sides, and remove the marks",
        ),
    ],
)
def test_one_problem_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    assert refusal(tmp_path, text) == f"params.yaml:{message}"


def test_all_problems_are_reported_together_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = "zebra: 1\ndata:\n  max_lenght: 5\n  overlong: chop\ntrain: {epochs: 0}\nmethod: {r: 1, r: 2}\n"
    assert [line.split(":")[1] for line in refusal(tmp_path, text).splitlines()] == ["1", "3", "4", "5", "6"]


def test_an_unknown_key_like_no_other_lists_what_there_is(tmp_path: Path) -> None:
    assert (
        refusal(tmp_path, "register: {zzz: 1}")
        == "params.yaml:1: register.zzz: unknown key; give one of remote, git_remote, signing_key"
    )


@pytest.mark.parametrize(
    ("text", "line"),
    [("a: [1", 1), ("data:\n  x: 1\n y: 2", 3), ("\tdata: 1", 1), ("data: *x", 1), ("data: !tag 3", 1)],
)
def test_invalid_yaml_is_refused_with_its_line(tmp_path: Path, text: str, line: int) -> None:
    assert refusal(tmp_path, text).startswith(f"params.yaml:{line}: not valid YAML: ")


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("data:\n  ignored_fields: !!python/tuple [a]\n", "without a tag"),
        ("data:\n\tmax_length: 5\n", "indent by spaces"),
        ("data: {max_length: 5}\n---\ndata: {max_length: 5}\n", "write one document"),
    ],
)
def test_invalid_yaml_of_other_programs_is_told_with_what_to_do(tmp_path: Path, text: str, advice: str) -> None:
    assert advice in refusal(tmp_path, text)


@pytest.mark.parametrize("text", ["", "# nothing\n", "- 1", "seven"])
def test_a_file_without_sections_is_refused(tmp_path: Path, text: str) -> None:
    assert refusal(tmp_path, text).startswith("params.yaml:1: expected sections")


def test_a_section_within_itself_is_refused(tmp_path: Path) -> None:
    assert "nested too deeply" in refusal(tmp_path, "data: &a {max_length: *a}")


def test_a_missing_file_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"params\.yaml: cannot be read .*; run this where params\.yaml is"):
        load_params(tmp_path / "params.yaml")


def test_a_file_that_is_no_text_says_what_it_has_to_be(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_bytes("project: {name: käse}".encode("latin-1"))
    with pytest.raises(ParamsError, match=r"can't decode byte.*; make it a readable text file in UTF-8"):
        load_params(tmp_path / "params.yaml")
