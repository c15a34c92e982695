"""The section `gate.judge`: what it may hold, and what a wrong value is told."""

from pathlib import Path

import pytest
from params_texts import read, refusal

from flows.params import Judge
from flows.params.judge import TEMPLATE, check_template, fill_template

ENDPOINT = "endpoint: 'http://h/v1', model: m"


def test_it_is_off_by_default_and_on_with_either_kind(tmp_path: Path) -> None:
    assert not read(tmp_path, "gate: {}").gate.judge.is_on
    assert read(tmp_path, f"gate: {{judge: {{{ENDPOINT}, api_key: 'env:KEY'}}}}").gate.judge.is_on
    judge = read(tmp_path, "gate: {judge: {callable: data/judge.py:prefer}}").gate.judge
    assert judge.is_on and judge.function == ("data/judge.py", "prefer")
    assert Judge.model_validate(judge.model_dump()) == judge, "as the record gives it back"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("endpoint: 'http://h/v1'", "endpoint: 'http://h/v1' does not fit; give model too"),
        ("endpoint: h/v1, model: m", "endpoint: 'h/v1' does not fit"),
        (
            f"{ENDPOINT}, callable: data/j.py:f",
            "callable: 'data/j.py:f' does not fit; give either endpoint or callable",
        ),
        ("callable: judge.py:f", "callable: 'judge.py:f' does not fit; give a function as data/FILE.py:FUNCTION"),
        ("callable: data/../j.py:f", "callable: 'data/../j.py:f' does not fit"),
        ("callable: data/j.py:f, model: m", "model: 'm' does not fit; only a judge with endpoint uses it"),
        ("criterion: short", "criterion: 'short' does not fit; only a judge with endpoint uses it"),
        (f"{ENDPOINT}, api_key: my-key", "api_key: 'my-key' does not fit; give env:VARIABLE"),
        (f"{ENDPOINT}, template: t.txt", "template: 't.txt' does not fit; give data/FILE.txt"),
        (f"{ENDPOINT}, options: {{stream: true}}", "the judge sets stream itself"),
        (f"{ENDPOINT}, margin: 0.5", "margin: 0.5 does not fit"),
        (f"{ENDPOINT}, margn: 0.1", "margn: unknown key; did you mean margin?"),
    ],
)
def test_a_wrong_value_is_told_what_fits(tmp_path: Path, text: str, message: str) -> None:
    told = refusal(tmp_path, f"gate: {{judge: {{{text}}}}}")
    assert "gate.judge" in told and message in told


def test_a_classification_has_no_answers_to_judge(tmp_path: Path) -> None:
    data = "data: {source: a.jsonl, kind: classification}\ntrain: {objective: classification}\n"
    told = refusal(tmp_path, f"{data}gate: {{judge: {{callable: data/j.py:f}}}}")
    assert "gate.judge.callable: 'data/j.py:f' does not fit; train.objective is classification" in told


def test_everything_that_decides_a_verdict_is_in_the_identity(tmp_path: Path) -> None:
    first = Judge(endpoint="http://h/v1", model="m")
    assert first.identity(tmp_path)["template"] == TEMPLATE
    for change in ({"model": "n"}, {"criterion": "c"}, {"options": {}}, {"endpoint": "http://i"}):
        assert first.model_copy(update=change).identity(tmp_path) != first.identity(tmp_path)
    assert first.model_copy(update={"margin": 0.0, "parallel": 1}).identity(tmp_path) == first.identity(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "t.txt").write_text("one")
    other = first.model_copy(update={"template": "data/t.txt"})
    before = other.identity(tmp_path)
    (tmp_path / "data" / "t.txt").write_text("two")
    assert other.identity(tmp_path) != before


def test_a_template_needs_its_placeholders() -> None:
    check_template(TEMPLATE)
    with pytest.raises(ValueError, match=r"it lacks \{first\}, \{second\}"):
        check_template("{prompt}")
    with pytest.raises(ValueError, match=r"it has \{answer\}; the placeholders are \{criterion\}"):
        check_template("{prompt} {first} {second} {answer}")
    assert fill_template("{a}{b}", {"a": "{b}", "b": "x"}) == "{b}x"
