"""The command that turns ratings into rows."""

import json
from pathlib import Path

import pytest
from command_line import peftcore


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Records with one good answer, in a folder that is no project."""
    monkeypatch.chdir(tmp_path)
    common = {"id": "chatcmpl-1", "time": "2026-11-24T12:00:00+00:00", "user": None}
    answer = {"kind": "answer", **common, "model": "m", "version": "m", "messages": [{"role": "user", "content": "Hi"}],
              "choices": [{"index": 0, "text": "Hello.", "finish": "stop"}]}  # fmt: skip
    rating = {"kind": "rating", **common, "index": 0, "rating": 1.0, "correction": None, "comment": None}
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "000001.jsonl").write_text(f"{json.dumps(answer)}\n{json.dumps(rating)}\n{{")
    return tmp_path / "records"


def test_rows_are_written_and_counted(records: Path, tmp_path: Path) -> None:
    done = peftcore("feedback", str(records), "--kind", "chat", "--out", "rows.jsonl")
    assert done.exit_code == 0, done.stderr
    assert "1 rows of 1 ratings by 0 users" in done.stdout
    assert "1 without a user, to which --per-user does not apply" in done.stdout
    assert "1 damaged lines left out" in done.stdout and "file      rows.jsonl" in done.stdout
    assert json.loads((tmp_path / "rows.jsonl").read_text())["messages"][1]["content"] == "Hello."


def test_json_and_a_period_without_ratings(records: Path) -> None:
    given = ["--kind", "unpaired_preference", "--out", "rows.jsonl", "--since", "2026-11-25", "--json"]
    done = peftcore("feedback", str(records), *given)
    report = json.loads(done.stdout)
    assert (done.exit_code, report["ratings"], report["rows"], report["path"]) == (0, 0, 0, None)
    done = peftcore("feedback", str(records), *given[:-3])
    assert "1 rows (1 true)" in done.stdout


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ([], 2, "there is no project here; give one of unpaired_preference, preference, chat"),
        (["--kind", "chat"], 1, "give --out FILE.jsonl"),
        (["--kind", "chat", "--out", "a.jsonl", "--bad", "0.8"], 1, "--bad must be below --good"),
        (["--kind", "chat", "--out", "a.jsonl", "--since", "monday"], 2, "monday"),
    ],
)
def test_what_does_not_fit_is_said(records: Path, options: list[str], status: int, words: str) -> None:
    done = peftcore("feedback", str(records), *options)
    assert (done.exit_code, words in " ".join(done.stderr.replace("│", " ").split())) == (status, True), done.stderr
