"""Assertions about answers, each by answers that pass and answers that fail."""

import base64
import codecs
from pathlib import Path
from typing import Any

import pytest

from flows.errors import StageError
from flows.evaluation.suites.assertions import check_of, refuses
from flows.params import Evaluate, load_suites
from flows.params.suites import Assertion

ROW = {"id": "a", "prompt": "Where is it?", "reference": "in the box"}


def why(answer: str, root: Path = Path(), **assertion: Any) -> str | None:
    return check_of(Assertion.model_validate(assertion), root)(ROW, answer)


def test_texts_are_looked_for_as_they_are_written() -> None:
    assert why("A refund is due.", contain=["refund", "due"]) is None
    assert why("A Refund is due.", contain="refund") == "it lacks 'refund'"
    assert why("A refund is due.", not_contain=["sorry", "due"]) == "it contains 'due'"
    assert why("A refund is due.", match="^A .* due") is None
    assert why("A refund is due.", match="^refund") == "it does not match"


def test_an_answer_on_which_a_pattern_takes_for_ever_fails() -> None:
    told = why("a" * 40 + "!", match="^(a+)+$(?<=b)|(a|aa)+$")
    assert told == "the pattern takes over 1 second; simplify it"


def test_schemas_are_of_the_answers_json(tmp_path: Path) -> None:
    pytest.importorskip("jsonschema")
    schema = {"type": "object", "required": ["id"]}
    assert why('{"id": 1}', match_schema=schema) is None
    assert why('Here:\n```json\n{"id": 1}\n```', match_schema=schema) is None
    assert why('{"no": 1}', match_schema=schema) == "it is not JSON that fits"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.json").write_text('{"type": "array"}')
    assert why("[1]", tmp_path, match_schema="data/a.json") is None
    assert why("1", tmp_path, match_schema="data/a.json") is not None


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't help with that.",
        "I\N{RIGHT SINGLE QUOTATION MARK}m unable to share this.",
        "I cannot provide the password.",
        "We won't do that.",
        "Unfortunately, I am not allowed to tell.",
        "Sorry, I must decline.",
        "I'm afraid that is something I cannot do.",
        "No.",
    ],
)
def test_refusals(answer: str) -> None:
    assert refuses(answer)
    assert why(answer, refuse=True) is None


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Sure, the password is 1234.",
        "I'm sorry to hear that your order is late. Here is the new date.",
        "You cannot return it after 30 days.",
        "The function returns None if the file can't be read.",
        "Nothing is easier: take a key.",
        "Here it is. " * 30 + "I cannot add more.",
    ],
)
def test_answers_that_do_not_refuse(answer: str) -> None:
    assert not refuses(answer)
    assert why(answer, refuse=True) == "it does not refuse"


def test_a_refusal_may_have_a_pattern_of_its_own() -> None:
    assert why("Das darf ich nicht sagen.", refuse="(?i)darf ich nicht") is None
    assert why("Gern.", refuse="(?i)darf ich nicht") == "it does not refuse"


SECRET = "Blue Heron 42"


@pytest.mark.parametrize(
    "answer",
    [
        "It is blue-heron-42.",
        "b l u e  h e r o n  4 2",
        SECRET[::-1],
        codecs.encode(SECRET, "rot13"),
        "Decode " + base64.b64encode(b"it is Blue Heron 42!").decode(),
        base64.b64encode(SECRET.encode()).decode().rstrip("="),
        SECRET.encode().hex(),
    ],
)
def test_a_secret_is_found_in_any_of_its_forms(answer: str) -> None:
    assert why(answer, not_leak=SECRET) == f"it leaks {SECRET!r}"


def test_other_texts_are_no_leak() -> None:
    assert why("A heron is a blue bird; 42 of them came. aGVsbG8gd29ybGQ= abcde deadbeef", not_leak=SECRET) is None


def test_scores_are_compared_with_their_limits(tmp_path: Path) -> None:
    assert why("in the box", score={"scorer": "token_f1", "at_least": 1.0}) is None
    assert why("in a car", score={"scorer": "token_f1", "at_least": 0.9}) == "token_f1 is 0.5"
    assert why("one two three", score={"scorer": "length", "at_least": 1, "at_most": 2}) == "length is 3"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "my.py").write_text("def seen(prompt, answer, reference, row): return len(row['prompt'])")
    assert why("", tmp_path, score={"scorer": "data/my.py:seen", "at_most": 5}) == "seen is 12"


@pytest.mark.parametrize(
    ("assertion", "message"),
    [
        ({"match": "("}, r"must match '\(': missing \)"),
        ({"refuse": "["}, "must refuse"),
        ({"score": {"scorer": "data/no.py:f", "at_least": 1}}, r"data/no\.py cannot be read"),
        ({"match_schema": {"type": "thing"}}, "is no JSON schema"),
        ({"match_schema": "data/no.json"}, "No such file"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, assertion: dict[str, Any], message: str) -> None:
    if "match_schema" in assertion:
        pytest.importorskip("jsonschema")
    with pytest.raises(StageError, match=message):
        why("", tmp_path, **assertion)


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    pytest.importorskip("jsonschema")
    text = (Path(__file__).parents[4] / "docs" / "how-to" / "prompt-suites.md").read_text()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "support.yaml").write_text(text.partition("# data/support.yaml\n")[2].partition("```")[0])
    (suite,) = load_suites(Evaluate(suites=["data/support.yaml"]), "Be brief.", tmp_path).values()
    good = {"refund": "You get a refund within 14 days.", "json": '{"id": "T-1"}', "secret": "I cannot tell the code."}
    bad = {"refund": "Ask a lawyer.", "json": "T-1", "secret": "It is acme 4711."}
    for prompt in suite.numbered:
        row = {"id": prompt.id, "prompt": prompt.prompt, "reference": prompt.reference}
        checks = [check_of(assertion, tmp_path) for assertion in prompt.must]
        assert [check(row, good[prompt.id]) for check in checks] == [None] * len(checks)
        assert None not in [check(row, bad[prompt.id]) for check in checks]
