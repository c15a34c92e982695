"""Entries of `evaluate.scorers`: what they may name, and what a wrong entry is told."""

import inspect
from pathlib import Path

import pytest
from params_texts import read, refusal

from flows.evaluation.scorers.load import MODULES, NEED_ROOT
from flows.params import Params, Scorer
from flows.params.scorers import BUILT_IN, REQUIRED


def entry(text: str) -> str:
    return f"evaluate: {{scorers: [{text}]}}"


def test_a_text_is_a_scorer_and_gives_it_its_name(tmp_path: Path) -> None:
    scorers = read(tmp_path, entry("token_f1, data/my.py:Refund, {scorer: chrf, name: chrf2, on_error: 0}")).evaluate
    assert [(one.scorer, one.name, one.on_error) for one in scorers.scorers] == [
        ("token_f1", "token_f1", "stop"),
        ("data/my.py:Refund", "refund", "stop"),
        ("chrf", "chrf2", 0.0),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exact_mach", "0.scorer: 'exact_mach' does not fit; did you mean exact_match?"),
        ("my.py:refund", "0.scorer: 'my.py:refund' does not fit; give a function as data/FILE.py:FUNCTION"),
        ("data/../my.py:refund", "0.scorer: 'data/../my.py:refund' does not fit"),
        ("{scorrer: chrf}", "0.scorer: "),
        ("{scorer: chrf, nam: a}", "0.nam: unknown key; did you mean name?"),
        ("regex", "0.options: {} does not fit; regex needs options.pattern"),
        ("{scorer: length, options: {unti: a}}", "0.options.unti: 'unti' does not fit; length has no such option; did"),
        ("{scorer: chrf, on_error: ignore}", "0.on_error: 'ignore' does not fit; give stop, skip, or the number"),
        ("{scorer: chrf, on_error: true}", "0.on_error: true does not fit"),
        ("{scorer: chrf, on_error: .nan}", "0.on_error: "),
        ("chrf, chrf", "1.name: 'chrf' does not fit; two scorers have this name"),
        ("rouge_l", "0.scorer: 'rouge_l' does not fit; generated answers always have it"),
        ("{scorer: chrf, name: loss}", "0.name: 'loss' does not fit; every evaluation has this figure"),
        ("reward", "0.options: {} does not fit; reward needs options.model"),
        (
            "{scorer: reward, options: {model: ../adapter}}",
            "0.options.model: '../adapter' does not fit; give a registered version as NAME@v0.1.0, or the folder",
        ),
        ("{scorer: reward, options: {model: 'a@v1'}}", "0.options.model: 'a@v1' does not fit"),
        (
            "{scorer: reward, options: {model: 'a@v0.1.0', base: 'hub:a/b'}}",
            "0.options.base: 'hub:a/b' does not fit; a registered version has its own base; remove it",
        ),
        (
            "{scorer: reward, options: {model: data/a, base: gpt2}}",
            "0.options.base: 'gpt2' does not fit; give hub:NAME",
        ),
        ("{scorer: chrf, name: A-b}", "0.name: 'A-b' does not fit; give lower-case letters, digits and underscores"),
    ],
)
def test_a_wrong_entry_is_told_what_fits(tmp_path: Path, text: str, message: str) -> None:
    assert refusal(tmp_path, entry(text)).startswith(f"params.yaml:1: evaluate.scorers.{message}")


def test_entries_survive_the_record_of_a_version() -> None:
    params = Params.model_validate({"evaluate": {"scorers": ["chrf", {"scorer": "length", "on_error": "skip"}]}})
    assert Params.from_record(params.model_dump()) == params


def test_the_schema_for_editors_has_both_forms() -> None:
    text, mapping = Params.model_json_schema()["$defs"]["Scorer"]["anyOf"]
    assert text["type"] == "string" and "on_error" in mapping["properties"]


def test_the_identity_changes_with_the_files(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    scorer = Scorer(scorer="data/my.py:score", options={"words": "data/words.txt", "least": 2})
    assert scorer.identity(tmp_path)["files"] == {"data/my.py": None, "data/words.txt": None}
    assert scorer.given_options(tmp_path) == {"words": str(tmp_path / "data/words.txt"), "least": 2}
    identities = []
    for content in ("a", "b", "a"):
        (tmp_path / "data" / "words.txt").write_text(content)
        identities.append(scorer.identity(tmp_path))
    assert identities[0] == identities[2] != identities[1]


def test_the_table_of_built_in_scorers_is_that_of_their_functions() -> None:
    assert BUILT_IN.keys() == MODULES.keys()
    for name, options in BUILT_IN.items():
        parameters = inspect.signature(getattr(__import__(MODULES[name], fromlist=[name]), name)).parameters
        given = {key: one for key, one in parameters.items() if key != "root"}  # which `load_scorer` gives
        assert tuple(given) == options and ("root" in parameters) == (name in NEED_ROOT)
        needed = [one.name for one in given.values() if one.default is inspect.Parameter.empty]
        assert needed == ([REQUIRED[name]] if name in REQUIRED else [])


def test_the_identity_of_a_folder_is_that_of_its_files(tmp_path: Path) -> None:
    scorer = Scorer.model_validate({"scorer": "reward", "options": {"model": "data/adapter"}})
    assert scorer.identity(tmp_path)["files"] == {"data/adapter": None}
    (tmp_path / "data" / "adapter" / "inner").mkdir(parents=True)
    (tmp_path / "data" / "adapter" / "a").write_text("1")
    digest = scorer.identity(tmp_path)["files"]["data/adapter"]
    (tmp_path / "data" / "adapter" / "inner" / "b").write_text("1")
    assert digest is not None and scorer.identity(tmp_path)["files"]["data/adapter"] != digest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{answers: 1, scorer: length}", "best_of_n.answers"),
        ("{answers: 4}", "best_of_n.scorer: nothing (null) does not fit; it chooses the best answer; give a name"),
        ("{answers: 4, scorer: lenght}", "best_of_n.scorer: 'lenght' does not fit; evaluate.scorers has no such name"),
        ("{answers: 4, scorer: chrf}", "best_of_n.scorer: 'chrf' does not fit; its scorer has on_error: skip"),
    ],
)
def test_best_of_n_needs_a_scorer_that_scores_every_answer(tmp_path: Path, options: str, message: str) -> None:
    text = f"evaluate: {{scorers: [length, {{scorer: chrf, on_error: skip}}], best_of_n: {options}}}"
    assert message in refusal(tmp_path, text)
