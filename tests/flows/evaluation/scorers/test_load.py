"""Functions of the entries: from a file of the repository, installed, or not to be had, with the reason."""

import importlib.metadata
from pathlib import Path

import pytest

from flows.errors import StageError
from flows.evaluation.scorers import load
from flows.evaluation.scorers.load import check_scorers, load_scorer
from flows.params import Scorer

REFUND = """\
def refund(prompt, answer, reference, row, word="refund"):
    return word in answer

class Scorer:
    def __call__(self, prompt, answer, reference, row):
        return len(row["slice"])

counted = Scorer()
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "my.py").write_text(REFUND)
    return tmp_path


def scorer(function: str, file: str = "my", **options: object) -> Scorer:
    return Scorer(scorer=f"data/{file}.py:{function}", options=options)


def test_a_function_of_a_file_gets_its_options(root: Path) -> None:
    assert load_scorer(scorer("refund"), root)("", "no refund", "", {})
    assert not load_scorer(scorer("refund", word="money"), root)("", "no refund", "", {})
    assert load_scorer(scorer("counted"), root)("", "", "", {"slice": "abc"}) == 3
    assert not list(root.rglob("__pycache__")), "stages depend on the folder's content"


@pytest.mark.parametrize(
    ("entry", "content", "message"),
    [
        (scorer("refnd"), REFUND, r"data/my.py has no function refnd; did you mean refund\?"),
        (scorer("refund", file="other"), REFUND, r"other.py cannot be read .*create it and `git add` it"),
        (scorer("refund"), "def refund(:", "my.py is not valid Python"),
    ],
)
def test_what_is_missing_is_found_before_training(root: Path, entry: Scorer, content: str, message: str) -> None:
    (root / "data" / "my.py").write_text(content)
    for look in (lambda: check_scorers([entry], root), lambda: load_scorer(entry, root)):
        with pytest.raises(StageError, match=message):
            look()


def test_a_check_runs_no_code_of_the_repository(root: Path) -> None:
    (root / "data" / "my.py").write_text("import json\nraise SystemExit\ndef refund(): ...\nother = refund\n")
    check_scorers([scorer("refund"), scorer("other"), scorer("json"), Scorer(scorer="exact_match")], root)


@pytest.mark.parametrize(
    ("entry", "content", "message"),
    [
        (
            scorer("refund", words=3),
            REFUND,
            r"called with \(prompt, answer, reference, row, words=...\), which it does",
        ),
        (scorer("refund"), "def refund(answer): ...", "which it does not take: too many positional"),
        (scorer("refund"), "1 / 0\ndef refund(): ...", "fails when it is imported: ZeroDivisionError"),
        (scorer("refund"), "import sys\nsys.exit(3)", "imported: RuntimeError: it ends the process by"),
        (Scorer(scorer="length", options={"unit": "tokens"}), "", "length: unit is 'tokens'; give words or characters"),
        (Scorer(scorer="json_schema", options={"schema": "data/no.json"}), "", "No such file"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused(root: Path, entry: Scorer, content: str, message: str) -> None:
    (root / "data" / "my.py").write_text(content)
    with pytest.raises(StageError, match=message):
        load_scorer(entry, root)


def test_an_exit_is_an_error_of_the_function_except_the_stage_s_own(root: Path) -> None:
    content = "import sys\ndef end(prompt, answer, reference, row): sys.exit(row['status'])\n"
    (root / "data" / "my.py").write_text(content)
    score = load_scorer(scorer("end"), root)
    with pytest.raises(RuntimeError, match=r"it ends the process by sys.exit\(0\)"):
        score("", "", "", {"status": 0})
    with pytest.raises(SystemExit):
        score("", "", "", {"status": 143})  # SIGTERM, while the function runs


def test_an_installed_scorer_is_found_by_its_name(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = importlib.metadata.EntryPoint("longer", "operator:concat", "peftcore.scorers")

    def entry_points(**select: str) -> list[importlib.metadata.EntryPoint]:
        return [entry] if select.get("name", "longer") == "longer" and select["group"] == entry.group else []

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    with pytest.raises(StageError, match=r"longer is called with \(prompt, answer, reference, row\)"):
        load_scorer(Scorer(scorer="longer"), root)
    assert load._installed(Scorer(scorer="longer"))("a", "b") == "ab"
    with pytest.raises(ValueError, match="did you mean longer"):
        Scorer(scorer="longr")
