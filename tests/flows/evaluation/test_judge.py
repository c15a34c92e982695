"""The judge: an endpoint or a function, asked in both orders; every way to fail is an error or a count."""

import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest
from scripted_judge import ScriptedJudge, judging

from flows.errors import StageError
from flows.evaluation import judge as module
from flows.evaluation.judge import judge_pairs, read_choice
from flows.params import Judge


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAITS", (0.0, 0.0, 0.0))


def pair(candidate: str, champion: str, name: str = "a", prompt: str = "Which?") -> dict[str, str]:
    return {"id": name, "prompt": prompt, "reference": "ref", "candidate": candidate, "champion": champion}


def longer(request: str) -> str:
    """Prefers the longer answer, without any bias."""
    match = re.search(r"\[Answer A\]\n(.*)\n\n\[Answer B\]\n(.*)\n\nEnd", request, re.DOTALL)
    assert match
    first, second = map(len, match.groups())
    return "[[tie]]" if first == second else f"Thought.\n[[{'A' if first > second else 'B'}]]"


def endpoint(judge: ScriptedJudge, **values: Any) -> Judge:
    return Judge(endpoint=judge.url, model="judge-7b", **values)


def choices(result: dict[str, Any]) -> list[list[str]]:
    return [[reply["choice"] for reply in row["replies"]] for row in result["rows"]]


def function(root: Path, body: str) -> Judge:
    (root / "data").mkdir(exist_ok=True)
    (root / "data" / "judge.py").write_text(f"def prefer(prompt, first, second, reference):\n    {body}\n")
    return Judge(callable="data/judge.py:prefer")


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("[[A]]", "first"),
        ("Answer A said [[A]], yet\n[[ b ]]", "second"),
        ("**B**", "second"),
        ("[[tie]]", "tie"),
        ("Tie.", "tie"),
        ("A is better", "unreadable"),
        ("[[C]]", "unreadable"),
        ("", "unreadable"),
    ],
)
def test_the_last_verdict_of_a_reply_counts(text: str, choice: str) -> None:
    assert read_choice(text) == choice


def test_an_endpoint_is_asked_in_both_orders_and_a_second_time_not_at_all(tmp_path: Path) -> None:
    pairs = [pair("longer", "short", "a"), pair("x", "yy", "b"), pair("xx", "yy", "c"), pair("same", "same", "d")]
    with judging(longer) as server:
        judge = endpoint(server, options={"temperature": 0, "seed": 3}, parallel=2)
        first = judge_pairs(judge, pairs, tmp_path / "cache", tmp_path)
        assert choices(first) == [["first", "second"], ["second", "first"], ["tie", "tie"], []]
        assert first["identity"]["served"] == ["judge-7b-q4"] and first["identity"]["model"] == "judge-7b"
        assert len(server.requests) == 6, "equal answers are not asked about"
        assert all(body["temperature"] == 0 and body["seed"] == 3 for body in server.requests)
        assert set(server.keys) == {None}
    assert judge_pairs(judge, pairs, tmp_path / "cache", tmp_path) == first, "the endpoint is down now"
    with pytest.raises(StageError, match="does not answer"):
        judge_pairs(endpoint(server, criterion="it is short"), pairs, tmp_path / "cache", tmp_path)


def test_the_key_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with judging(longer) as server:
        judge = endpoint(server, api_key="env:JUDGE_KEY")
        monkeypatch.delenv("JUDGE_KEY", raising=False)
        with pytest.raises(StageError, match="the environment variable JUDGE_KEY is not set"):
            judge_pairs(judge, [pair("a", "bb")], tmp_path, tmp_path)
        monkeypatch.setenv("JUDGE_KEY", "secret-key")
        judge_pairs(judge, [pair("a", "bb")], tmp_path, tmp_path)
        assert set(server.keys) == {"Bearer secret-key"}
    assert not any("secret-key" in path.read_text() for path in tmp_path.iterdir())


def test_a_busy_endpoint_is_asked_again_and_verdicts_before_an_error_are_kept(tmp_path: Path) -> None:
    with judging(longer) as server:
        server.status = [503, 429]
        judge = endpoint(server, parallel=1)
        assert choices(judge_pairs(judge, [pair("a", "bb")], tmp_path, tmp_path)) == [["second", "first"]]
        assert len(server.requests) == 4
        server.status = [200, 401]
        with pytest.raises(StageError, match=r"does not answer \(status 401: busy\).* Verdicts so far are kept"):
            judge_pairs(judge, [pair("ccc", "d")], tmp_path, tmp_path)
        assert len(server.requests) == 6, "a status of 401 is final"
        judge_pairs(judge, [pair("ccc", "d")], tmp_path, tmp_path)
        assert len(server.requests) == 7, "only the other order"


def test_a_judge_that_is_down_is_an_error(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        judge = Judge(endpoint=f"http://127.0.0.1:{unused.getsockname()[1]}/v1", model="m")
        with pytest.raises(StageError, match=r"/v1/chat/completions does not answer \(ConnectError"):
            judge_pairs(judge, [pair("a", "bb")], tmp_path, tmp_path)


@pytest.mark.parametrize("raw", ["<html>", "[]", '{"choices": []}', '{"choices": [{"message": null}]}'])
def test_another_kind_of_server_is_an_error(tmp_path: Path, raw: str) -> None:
    with judging(longer) as server:
        server.raw = raw
        with pytest.raises(StageError, match="is no OpenAI-compatible endpoint"):
            judge_pairs(endpoint(server), [pair("a", "bb")], tmp_path, tmp_path)


def test_nonsense_is_unreadable_and_asked_again_the_next_time(tmp_path: Path) -> None:
    with judging(lambda request: "I like both a lot.") as server:
        result = judge_pairs(endpoint(server), [pair("a", "bb")], tmp_path, tmp_path)
        assert choices(result) == [["unreadable", "unreadable"]]
        assert result["rows"][0]["replies"][0]["text"] == "I like both a lot."
        server.reply = longer
        assert choices(judge_pairs(endpoint(server), [pair("a", "bb")], tmp_path, tmp_path)) == [["second", "first"]]


def test_a_damaged_entry_of_the_cache_is_asked_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    judge, cache = function(tmp_path, "return 'first'"), tmp_path / "cache"
    judge_pairs(judge, [pair("a", "b")], cache, tmp_path)
    for path in cache.iterdir():
        path.write_text("{")
    assert choices(judge_pairs(judge, [pair("a", "b")], cache, tmp_path)) == [["first", "first"]]
    assert "the judge is asked again" in caplog.text


def test_a_template_gets_texts_with_braces_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    template = tmp_path / "data" / "judge.txt"
    template.write_text("{prompt}|{first}|{second}")
    with judging(lambda request: "[[A]]") as server:
        judge = endpoint(server, template="data/judge.txt")
        judge_pairs(judge, [pair("{second}", "y", prompt="{x}")], tmp_path / "cache", tmp_path)
        assert {body["messages"][0]["content"] for body in server.requests} == {"{x}|{second}|y", "{x}|y|{second}"}
        with pytest.raises(StageError, match="criterion is not used"):
            judge_pairs(endpoint(server, template="data/judge.txt", criterion="c"), [], tmp_path / "cache", tmp_path)
        template.write_text("{prompt} {first} {scond}")
        with pytest.raises(StageError, match=r"data/judge.txt does not fit: it lacks \{second\}"):
            judge_pairs(judge, [], tmp_path / "cache", tmp_path)
        template.unlink()
        with pytest.raises(StageError, match="No such file"):
            judge_pairs(judge, [], tmp_path / "cache", tmp_path)


def test_a_function_gets_both_orders_and_a_changed_function_is_asked_again(tmp_path: Path) -> None:
    judge = function(
        tmp_path, "assert (prompt, reference) == ('Which?', 'ref'); return 'first' if first == 'a' else 'tie'"
    )
    result = judge_pairs(judge, [pair("a", "b")], tmp_path / "cache", tmp_path)
    assert choices(result) == [["first", "tie"]]
    assert result["identity"]["callable"] == "data/judge.py:prefer" and len(result["identity"]["files"]) == 1
    changed = judge_pairs(function(tmp_path, "return 'second'"), [pair("a", "b")], tmp_path / "cache", tmp_path)
    assert choices(changed) == [["second", "second"]]
    stored = [json.loads(path.read_text()) for path in (tmp_path / "cache").iterdir()]
    assert {one["first"] for one in stored} == {"a", "b"} and len(stored) == 4


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise RuntimeError('no quota')", "data/judge.py:prefer failed: RuntimeError: no quota"),
        ("return 1\nimport missing_package", "fails when it is imported: ModuleNotFoundError"),
        ("return 1\nprefer = lambda one: one", "which it does not take"),
        ("return 1\ndel prefer", "has no function prefer"),
    ],
)
def test_a_function_that_does_not_work_is_an_error(tmp_path: Path, body: str, message: str) -> None:
    judge = function(tmp_path, body)
    with pytest.raises(StageError, match=message):
        judge_pairs(judge, [pair("a", "b")], tmp_path / "cache", tmp_path)


def test_a_function_that_returns_nonsense_is_unreadable(tmp_path: Path) -> None:
    result = judge_pairs(function(tmp_path, "return ['first']"), [pair("a", "b")], tmp_path / "cache", tmp_path)
    assert choices(result) == [["unreadable", "unreadable"]]
    assert result["rows"][0]["replies"][0]["text"] == "['first']"
