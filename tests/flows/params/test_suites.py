"""Files of prompt suites: what they may hold, and what a wrong file is told."""

import re
from pathlib import Path
from typing import Any

import pytest
from params_texts import read, refusal

from flows.errors import ParamsError, StageError
from flows.params import Evaluate, Scorer, Suite, load_suites
from flows.params.suites import Assertion, Score

SUITE = """\
prompts:
  - id: refund
    prompt: How do I get my money back?
    must:
      - {}
"""


def load(folder: Path, text: str, system_prompt: str | None = None, **evaluate: Any) -> Suite:
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "support.yaml").write_text(text)
    section = Evaluate.model_validate({"suites": ["data/support.yaml"], **evaluate})
    (suite,) = load_suites(section, system_prompt, folder).values()
    return suite


def test_values_that_a_suite_leaves_out_are_those_of_the_run(tmp_path: Path) -> None:
    text = SUITE.format("contain: refund")
    suite = load(tmp_path, text, "Be brief.", max_new_tokens=7)
    assert (suite.system_prompt, suite.max_new_tokens) == ("Be brief.", 7)
    assert suite.chat(suite.prompts[0]) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How do I get my money back?"},
    ]
    own = load(tmp_path, "system_prompt: null\nmax_new_tokens: 9\n" + text, "Be brief.", max_new_tokens=7)
    assert (own.system_prompt, own.max_new_tokens) == (None, 9)
    assert [turn["role"] for turn in own.chat(own.prompts[0])] == ["user"]


def test_a_prompt_without_an_id_has_its_number(tmp_path: Path) -> None:
    text = "prompts: [{prompt: a, must: [{contain: b}]}, {id: x, prompt: c, must: [{contain: d}]}]"
    assert [prompt.id for prompt in load(tmp_path, text).numbered] == ["1", "x"]


def test_turns_with_a_system_prompt_keep_it(tmp_path: Path) -> None:
    turns = "[{role: system, content: s}, {role: user, content: u}]"
    suite = load(tmp_path, f"prompts: [{{messages: {turns}, must: [{{refuse: true}}]}}]", "Be brief.")
    assert [turn["content"] for turn in suite.chat(suite.prompts[0])] == ["s", "u"]


def test_the_identity_changes_with_content_settings_and_files_alone(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    schema, code = tmp_path / "data" / "a.json", tmp_path / "data" / "s.py"
    schema.write_text("{}")
    code.write_text("def f(prompt, answer, reference, row): return 1")
    text = SUITE.format("match_schema: data/a.json\n      - score: {scorer: data/s.py:f, at_least: 1}")
    first = load(tmp_path, text).identity(tmp_path)
    assert list(first["files"]) == ["data/a.json", "data/s.py"]
    assert load(tmp_path, "# a comment\n" + text).identity(tmp_path) == first
    assert load(tmp_path, text.replace("money", "cash")).identity(tmp_path) != first
    assert load(tmp_path, text, max_new_tokens=3).identity(tmp_path) != first
    assert load(tmp_path, text, "another prompt").identity(tmp_path) != first
    code.write_text("def f(prompt, answer, reference, row): return 2")
    assert load(tmp_path, text).identity(tmp_path) != first
    schema.unlink()
    with pytest.raises(StageError, match=r"data/support\.yaml names data/a\.json, which cannot be read"):
        load(tmp_path, text)


@pytest.mark.parametrize(
    ("assertion", "message"),
    [
        ("contian: refund", "must.0.contian: unknown key; did you mean contain?"),
        ("must_contain: a", "must.0.must_contain: unknown key; did you mean "),
        ("{contain: a, refuse: true}", "give exactly one of contain, not_contain, match, match_schema, refuse,"),
        ("{}", "give exactly one of contain"),
        ("contain: 7", "must.0.contain: 7 does not fit; give a text, or a list of texts"),
        ("contain: []", "must.0.contain: [] does not fit; give a text, or a list of texts"),
        ("refuse: false", "must.0.refuse: false does not fit; give true, or a regular expression"),
        ("not_leak: a-b", "give texts of at least 4 letters and digits; 'a-b' has fewer"),
        ("match_schema: a.json", "give a JSON schema as a mapping, or as a file below data/"),
        ("score: {scorer: exact_mach, at_least: 1}", "score.scorer: 'exact_mach' does not fit; did you mean exact_"),
        ("score: {scorer: nobody, at_least: 1}", "score.scorer: 'nobody' does not fit; give one of tickets, exact_"),
        ("score: {scorer: ticket, at_least: 1}", "score.scorer: 'ticket' does not fit; did you mean tickets?"),
        ("score: {scorer: my.py:f, at_least: 1}", "give a function as data/FILE.py:FUNCTION"),
        ("score: {scorer: length}", "give at_least or at_most"),
        ("score: {scorer: length, at_leest: 1}", "score.at_leest: unknown key; did you mean at_least?"),
        ("score: {scorer: {scorer: length, on_error: skip}, at_most: 1}", "an answer without a score would pass"),
    ],
)
def test_a_wrong_assertion_is_told_what_fits_and_its_line(tmp_path: Path, assertion: str, message: str) -> None:
    tickets = {"scorer": "regex", "name": "tickets", "options": {"pattern": "T-"}}
    with pytest.raises(ParamsError, match=re.escape(message)) as error:
        load(tmp_path, SUITE.format(assertion), scorers=[tickets])
    assert str(error.value).startswith("support.yaml:5: prompts.0.must.0")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompts: []", "prompts: "),
        ("promts: []", "promts: unknown key; did you mean prompts?"),
        ("prompts: [{prompt: a, must: []}]", "must: [] does not fit; give a list of assertions"),
        ("prompts: [{prompt: a}]", "prompts.0.must: "),
        ("prompts: [{must: [{refuse: true}]}]", "give either prompt or messages"),
        ("prompts: [{messages: [{role: assistant, content: a}], must: [{refuse: true}]}]", "give user as the last one"),
        (
            "prompts: [{id: a, prompt: a, must: [{refuse: true}]}, {id: a, prompt: b, must: [{refuse: true}]}]",
            "this id",
        ),
        ("temperature: 0.5\n" + SUITE.format("refuse: true"), "greedy answers do not use it; give seeds too"),
        ("seeds: [1, 1]\n" + SUITE.format("refuse: true"), "a seed is given twice"),
        ("seeds: [1, 2]\npass_at: 3\n" + SUITE.format("refuse: true"), "there are 2 seeds, so at most 2 answers"),
    ],
)
def test_a_wrong_suite_is_told_what_fits(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ParamsError, match=re.escape(message)):
        load(tmp_path, text)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("[support.yaml]", "evaluate.suites.0: 'support.yaml' does not fit; give data/FILE.yaml"),
        ("[data/../a.yaml]", "evaluate.suites.0: 'data/../a.yaml' does not fit"),
        ("[data/a.yaml, data/b/a.yml]", "evaluate.suites.1: 'data/b/a.yml' does not fit; two suites are called a"),
    ],
)
def test_a_wrong_path_is_told_what_fits(tmp_path: Path, names: str, message: str) -> None:
    assert message in refusal(tmp_path, f"evaluate: {{suites: {names}}}")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"support\.yaml: cannot be read"):
        load_suites(Evaluate(suites=["data/support.yaml"]), None, tmp_path)


def test_a_classifier_answers_no_prompts(tmp_path: Path) -> None:
    text = "data: {source: a.jsonl, kind: classification}\ntrain: {objective: classification}\n"
    assert "which generates no text" in refusal(tmp_path, text + "evaluate: {suites: [data/a.yaml]}")
    assert read(tmp_path, text).evaluate.suites == []


def test_a_named_entry_brings_its_options(tmp_path: Path) -> None:
    entry = {"scorer": "regex", "name": "tickets", "options": {"pattern": "T-"}}
    suite = load(tmp_path, SUITE.format("score: {scorer: tickets, at_least: 1}"), scorers=[entry])
    score = suite.prompts[0].must[0].score
    assert score is not None and score.scorer == Scorer.model_validate(entry)


def test_assertions_in_words() -> None:
    words = {
        "must contain 'a', 'b'": Assertion(contain=["a", "b"]),
        "must not leak 'ACME-1'": Assertion(not_leak=["ACME-1"]),
        "must refuse": Assertion(refuse=True),
        "must match '^a'": Assertion(match="^a"),
        "must match the schema data/a.json": Assertion(match_schema="data/a.json"),
        "must have length of at least 2 and at most 5": Assertion(
            score=Score(scorer=Scorer(scorer="length", name="length"), at_least=2, at_most=5)
        ),
    }
    assert {assertion.words for assertion in words.values()} == set(words)
