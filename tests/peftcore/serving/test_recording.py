"""Records of answers and ratings: what is written, when nothing can be, and what a killed process leaves."""

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from peftcore.errors import ConfigError
from peftcore.serving import Recorder, Records, Redaction, Rule, recording
from peftcore.serving.errors import BadRequestError, RecordingStoppedError, UnknownResponseError

SAY = [{"role": "user", "content": "Say it."}]


def answer(identity: str, text: str = "It.", **fields: Any) -> dict[str, Any]:
    choices = [{"index": 0, "text": text, "finish": "stop"}]
    return {
        "id": identity,
        "model": "base",
        "version": "base",
        "user": None,
        "messages": SAY,
        "choices": choices,
    } | fields


def rating(identity: str, **fields: Any) -> dict[str, Any]:
    return {"id": identity, "index": 0, "rating": 1.0, "correction": None, "comment": None, "user": None} | fields


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Callable[..., Recorder]]:
    """Recorders of a folder, which are closed at the end."""
    recorders: list[Recorder] = []

    def make(**options: Any) -> Recorder:
        recorders.append(Recorder(tmp_path / "records", **options))
        return recorders[-1]

    yield make
    for one in recorders:
        if one._thread.is_alive():
            one.close()


def test_an_answer_and_its_rating_are_on_disk_once_the_rating_is_accepted(made: Any, tmp_path: Path) -> None:
    recorder = made()
    recorder.answer(answer("chatcmpl-1", user="nadia"))
    recorder.rating(rating("chatcmpl-1", comment="fine", user="nadia")).result(10)
    first, second = Records(tmp_path / "records")
    assert (first["kind"], first["id"], first["choices"][0]["text"]) == ("answer", "chatcmpl-1", "It.")
    assert (second["kind"], second["rating"], second["comment"]) == ("rating", 1.0, "fine")
    assert first["user"] == second["user"] and len(first["user"]) == 16, "one user has one pseudonym"
    content = b"".join(path.read_bytes() for path in (tmp_path / "records").iterdir())
    assert b"nadia" not in content  # a name that no hexadecimal number contains
    assert (tmp_path / "records").stat().st_mode & 0o077 == 0
    assert recorder.written == {"answer": 1, "rating": 1} and not recorder.dropped


def test_git_ignores_a_new_folder_of_records_and_no_folder_with_other_files(made: Any, tmp_path: Path) -> None:
    made().close()
    assert (tmp_path / "records" / ".gitignore").read_text() == "*\n"
    (other := tmp_path / "other").mkdir()
    (other / "notes").write_text("mine")
    Recorder(other).close()
    assert not (other / ".gitignore").exists()


def test_every_text_is_redacted(made: Any, tmp_path: Path) -> None:
    recorder = made(redaction=Redaction([Rule("Ada", "<name>")]))
    recorder.answer(answer("chatcmpl-1", "Hello Ada", messages=[{"role": "user", "content": "I am Ada"}]))
    recorder.answer({"id": "cmpl-2", "prompt": "Ada", "choices": [], "user": None})
    recorder.rating(rating("chatcmpl-1", comment="Ada!", correction="Hi Ada")).result(10)
    content = next((tmp_path / "records").glob("*.part")).read_text()
    assert "Ada" not in content and content.count("<name>") == 5


def test_every_text_of_tool_calls_is_redacted(made: Any, tmp_path: Path) -> None:
    recorder = made(redaction=Redaction([Rule("Ada", "<name>"), Rule("4{9}", "<number>")]))

    def call(arguments: Any) -> dict[str, Any]:
        return {"id": "call-Ada", "type": "function", "function": {"name": "mail_Ada", "arguments": arguments}}

    arguments = {"to": "Ada", "cc": [{"Ada": "Ada!"}], "phone": 444444444, "copies": 2, "now": True, "at": None}
    calls = [call(arguments), call('{"to": "Ada"}')]
    messages = [
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "sent to Ada", "tool_call_id": "call-Ada"},
    ]
    choices = [{"index": 0, "text": "", "finish": "tool_calls", "tool_calls": [call('{"to": "Ada"}')]}]
    recorder.answer(answer("chatcmpl-1", messages=messages, choices=choices))
    recorder.close()
    assert "Ada" not in next((tmp_path / "records").glob("*.jsonl")).read_text()
    (record,) = Records(tmp_path / "records")
    asked, answered = record["messages"]
    first, second = asked["tool_calls"]
    assert first["function"]["name"] == "mail_<name>" and first["type"] == "function"
    assert first["function"]["arguments"] == {
        "to": "<name>", "cc": [{"<name>": "<name>!"}], "phone": "<number>", "copies": 2, "now": True, "at": None
    }  # fmt: skip
    assert second["function"]["arguments"] == '{"to": "<name>"}'
    assert answered["tool_call_id"] == first["id"] == "call-<name>", "the answer still belongs to its call"
    assert record["choices"][0]["tool_calls"][0]["function"]["arguments"] == '{"to": "<name>"}'


def test_what_cannot_be_rated_is_said(made: Any) -> None:
    recorder = made()
    recorder.answer(answer("chatcmpl-1"))
    with pytest.raises(UnknownResponseError, match="no recorded response has the id 'chatcmpl-2'"):
        recorder.rating(rating("chatcmpl-2"))
    with pytest.raises(BadRequestError, match="the response has 1 answers, from index 0; got 1"):
        recorder.rating(rating("chatcmpl-1", index=1))


def test_only_the_newest_answers_are_held_for_ratings(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "RATEABLE", 2)
    recorder = made()
    for number in range(4):
        recorder.answer(answer(f"chatcmpl-{number}"))
    assert list(recorder._choices) == ["chatcmpl-2", "chatcmpl-3"]
    with pytest.raises(UnknownResponseError, match=r"'chatcmpl-1'.*the newest 2 responses"):
        recorder.rating(rating("chatcmpl-1"))
    recorder.rating(rating("chatcmpl-2")).result(10)
    recorder.close()
    monkeypatch.setattr(recording, "RATEABLE", 1)
    assert list(made()._choices) == ["chatcmpl-3"], "a later server"


def test_segments_are_closed_at_their_size_and_by_the_end(made: Any, tmp_path: Path) -> None:
    recorder = made(segment=300)
    for number in range(4):
        recorder.answer(answer(f"chatcmpl-{number}"))
        recorder.rating(rating(f"chatcmpl-{number}")).result(10)
    recorder.close()
    names = sorted(path.name for path in (tmp_path / "records").glob("0*"))
    assert len(names) >= 3 and all(name.endswith(".jsonl") for name in names)
    assert [one["kind"] for one in Records(tmp_path / "records")] == ["answer", "rating"] * 4
    after = made()  # a later server knows the answers
    after.rating(rating("chatcmpl-0", rating=0.0)).result(10)
    assert list(Records(tmp_path / "records"))[-1]["rating"] == 0.0


def test_a_full_folder_stops_the_recording_until_there_is_room(made: Any, tmp_path: Path) -> None:
    warnings: dict[str, str] = {}
    recorder = made(most=500, segment=100, warnings=warnings)
    recorder.answer(answer("chatcmpl-1"))
    recorder.rating(rating("chatcmpl-1")).result(10)
    recorder.answer(answer("chatcmpl-2", "long " * 100))
    with pytest.raises(RecordingStoppedError, match="have reached 500 bytes"):
        recorder.rating(rating("chatcmpl-1", comment="x" * 500)).result(10)
    assert recorder.dropped == {"full": 2} and "Move closed segments away" in warnings["recording"]
    with pytest.raises(UnknownResponseError):
        recorder.rating(rating("chatcmpl-2"))
    for path in (tmp_path / "records").glob("*.jsonl"):
        path.unlink()
    recorder.rating(rating("chatcmpl-1")).result(10)
    assert not warnings


def test_a_full_disk_loses_no_earlier_record(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: dict[str, str] = {}
    recorder = made(warnings=warnings)
    recorder.answer(answer("chatcmpl-1"))
    recorder.rating(rating("chatcmpl-1")).result(10)

    def full(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(recording.os, "fsync", full)
        with pytest.raises(RecordingStoppedError, match="No space left"):
            recorder.rating(rating("chatcmpl-1", rating=0.0)).result(10)
        before = sorted((tmp_path / "records").iterdir())
        for _ in range(3):
            with pytest.raises(RecordingStoppedError, match="No space left"):
                recorder.rating(rating("chatcmpl-1", rating=0.0)).result(10)
        assert sorted((tmp_path / "records").iterdir()) == before, "records that do not fit leave no files"
    assert recorder.dropped == {"disk": 4} and "No space left" in warnings["recording"]
    recorder.rating(rating("chatcmpl-1", rating=0.5)).result(10)
    assert not warnings
    records = Records(tmp_path / "records")
    assert [one.get("rating") for one in records] == [None, 1.0, 0.5] and not records.damaged


def test_a_rule_that_takes_too_long_leaves_the_record_out(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftcore.serving.redaction.SECONDS", 0.05)
    warnings: dict[str, str] = {}
    recorder = made(redaction=Redaction([Rule(r"(?:a|a)+(?:a|a)+(?:a|a)+b", "")]), warnings=warnings)
    recorder.answer(answer("chatcmpl-1"))
    with pytest.raises(RecordingStoppedError, match="a redaction rule took longer"):
        recorder.rating(rating("chatcmpl-1", comment="a" * 200 + "c")).result(10)
    assert recorder.dropped == {"redaction": 1} and "Correct the rule" in warnings["redaction"]


def test_a_fault_of_the_writer_is_told_and_does_not_end_it(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = made()
    recorder.answer(answer("chatcmpl-1"))
    with monkeypatch.context() as patch:
        patch.setattr(recorder, "_room", lambda needed: 1 // 0)
        with pytest.raises(RecordingStoppedError, match="ZeroDivisionError"):
            recorder.rating(rating("chatcmpl-1")).result(10)
    assert recorder.dropped["error"] >= 1
    recorder.answer(answer("chatcmpl-2"))
    recorder.rating(rating("chatcmpl-2")).result(10)
    assert recorder.written["rating"] == 1


def test_more_records_than_the_disk_takes_are_counted(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "WAITING", 1)
    recorder = made()
    fsync = os.fsync
    monkeypatch.setattr(recording.os, "fsync", lambda file: (time.sleep(0.3), fsync(file)))
    for number in range(5):
        recorder.answer(answer(f"chatcmpl-{number}"))
    recorder.close()
    assert recorder.dropped["queue"] >= 2
    assert recorder.written["answer"] + recorder.dropped["queue"] == 5


def test_a_folder_is_of_one_server(made: Any, tmp_path: Path) -> None:
    made()
    with pytest.raises(ConfigError, match="another server records in"):
        made()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot record in"):
        Recorder(tmp_path / "file")


def test_damaged_lines_are_counted_and_the_others_read(tmp_path: Path) -> None:
    lines = [json.dumps({"kind": "answer", **answer(f"chatcmpl-{number}")}) for number in range(3)]
    text = "\n".join([lines[0], "{", '{"kind": "other", "id": "1"}', lines[1], lines[2][:40]])
    (tmp_path / "000001.jsonl").write_text(text)
    (tmp_path / "000002.jsonl.part").write_text(lines[2] + "\n")
    records = Records(tmp_path)
    assert [one["id"] for one in records] == ["chatcmpl-0", "chatcmpl-1", "chatcmpl-2"]
    assert records.damaged == ["000001.jsonl:2", "000001.jsonl:3", "000001.jsonl:5"]
    with pytest.raises(ConfigError, match="there is no folder"):
        list(Records(tmp_path / "missing"))


KILLED = """
import sys
from pathlib import Path
from peftcore.serving.recording import Recorder
recorder = Recorder(Path(sys.argv[1]), segment=20_000)
for number in range(10**6):
    identity = f"chatcmpl-{number}"
    choices = [{"index": 0, "text": "word " * (number % 50), "finish": "stop"}]
    recorder.answer({"id": identity, "messages": [], "choices": choices})
    recorder.rating({"id": identity, "index": 0, "rating": 1.0}).result(60)
    print(identity, flush=True)
"""


@pytest.mark.slow
def test_kill_9_loses_no_accepted_rating(tmp_path: Path) -> None:
    folder, accepted = tmp_path / "records", []
    for moment in (40, 150, 301):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(moment):
            accepted.append(process.stdout.readline().strip())
        process.send_signal(signal.SIGKILL)
        accepted += process.stdout.read().split("\n")[:-1]  # whole lines that were printed before
        process.wait()
        process.stdout.close()
    # the torn line that a crash can leave
    newest = sorted(folder.glob("*.part"))[-1]
    with newest.open("ab") as file:
        file.write(b'{"kind": "rating", "id": "chatcm')
    records = Records(folder)
    rated = [one["id"] for one in records if one["kind"] == "rating"]
    assert len(rated) >= len(accepted) and not set(accepted) - set(rated)
    assert records.damaged == [f"{newest.name}:{newest.read_bytes().count(10) + 1}"]
    recorder = Recorder(folder)  # the next server starts, and knows the answers
    recorder.rating(rating(rated[-1], rating=0.0)).result(10)
    recorder.close()
    assert not list(folder.glob("*.part")) and len(list(Records(folder))) > 2 * len(accepted)


# -- the HTTP interface ---------------------------------------------------------------------------------------------


@pytest.fixture
def recorded(made: Any, serving: Any) -> Any:
    """A server that records."""
    warnings: dict[str, str] = {}
    served = serving(http=True, recorder=made(warnings=warnings), warnings=warnings, keys=["k"])
    served.http = httpx.Client(base_url=served.url, headers={"authorization": "Bearer k"}, timeout=60)
    yield served
    served.http.close()


def test_answers_are_recorded_whole_and_streamed_with_the_version_that_gave_them(recorded: Any, tmp_path: Path) -> None:
    client = recorded.client()
    given: Any = {
        "model": "sql",
        "messages": SAY,
        "max_tokens": 8,
        "temperature": 1.0,
        "seed": 5,
        "n": 2,
        "user": "ada",
    }
    whole = client.chat.completions.create(**given)
    chunks = list(client.chat.completions.create(**given, stream=True))
    text = client.completions.create(model="mix", prompt=[5, 6, 7], max_tokens=4)
    based = client.completions.create(model="base", prompt="def", max_tokens=4)
    for identity in (whole.id, chunks[0].id, text.id, based.id):
        reply = recorded.http.post("/v1/feedback", json={"id": identity, "rating": "up"})
        assert (reply.status_code, reply.json()["recorded"]) == (200, True)
    answers = {one["id"]: one for one in Records(tmp_path / "records") if one["kind"] == "answer"}
    texts = [choice.message.content for choice in whole.choices]
    for identity in (whole.id, chunks[0].id):
        one = answers[identity]
        assert [choice["text"] for choice in one["choices"]] == texts
        assert {choice["finish"] for choice in one["choices"]} <= {"stop", "length"}
        assert (one["model"], one["version"], one["messages"]) == ("sql", "sql", SAY) and len(one["user"]) == 16
    assert answers[text.id]["prompt"] == recorded.world.tokenizer.decode([5, 6, 7])
    assert answers[text.id]["version"] == "chat+sql" and answers[based.id]["version"] == "base"
    assert recorded.metric("peftcore_records_total", kind="answer") == 4
    assert recorded.metric("peftcore_records_total", kind="rating") == 4
    assert recorded.metric("peftcore_records_bytes") > 500


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"id": "chatcmpl-unknown", "rating": "up"}, 404, "no recorded response has the id"),
        ({"id": "?", "rating": 1.5}, 400, "give up, down, or a number from 0 (bad) to 1 (good), got 1.5"),
        ({"id": "?", "rating": -1}, 400, "got -1"),
        ({"id": "?", "rating": "good"}, 400, "rating: Input should be 'up' or 'down', got 'good'"),
        ({"id": "?"}, 400, "give a rating or a correction"),
        ({"id": "?", "correction": " "}, 400, "give a rating or a correction"),
        ({"rating": "up"}, 400, "id: Field required"),
        ({"id": "?", "rating": "up", "index": 3}, 400, "the response has 1 answers"),
        ({"id": "?", "rating": "up", "score": 3}, 400, "score: unknown field"),
    ],
)
def test_a_rating_that_is_none_is_refused(recorded: Any, body: dict[str, Any], status: int, words: str) -> None:
    given = recorded.client().completions.create(model="base", prompt="def", max_tokens=2)
    if body.get("id") == "?":
        body = body | {"id": given.id}
    reply = recorded.http.post("/v1/feedback", json=body)
    assert (reply.status_code, words in reply.json()["error"]["message"]) == (status, True), reply.json()
    assert recorded.metric("peftcore_records_total", kind="rating") == 0


def test_a_request_that_opts_out_is_not_recorded(recorded: Any, tmp_path: Path) -> None:
    body = {"model": "base", "messages": SAY, "max_tokens": 2}
    for stream in (False, True):
        reply = recorded.http.post("/v1/chat/completions", json=body | {"stream": stream},
                                   headers={"x-no-record": "true"})  # fmt: skip
        assert reply.status_code == 200
    identity = recorded.http.post("/v1/chat/completions", json=body, headers={"x-no-record": "1"}).json()["id"]
    assert recorded.http.post("/v1/feedback", json={"id": identity, "rating": "up"}).status_code == 404
    kept = recorded.http.post("/v1/chat/completions", json=body, headers={"x-no-record": "false"}).json()["id"]
    recorded.http.post("/v1/feedback", json={"id": kept, "rating": "up"})
    assert [one["id"] for one in Records(tmp_path / "records")] == [kept, kept]


def test_ratings_need_the_key_and_a_server_that_records(recorded: Any, serving: Any) -> None:
    assert httpx.post(f"{recorded.url}/v1/feedback", json={"id": "a", "rating": "up"}).status_code == 401
    plain = serving(http=True)
    reply = httpx.post(f"{plain.url}/v1/feedback", json={"id": "a", "rating": "up"})
    assert (reply.status_code, "start it with --record FOLDER" in reply.json()["error"]["message"]) == (403, True)
    assert plain.metric("peftcore_records_bytes") == 0.0


def test_a_full_folder_does_not_stop_the_server(serving: Any, made: Any) -> None:
    warnings: dict[str, str] = {}
    served = serving(http=True, recorder=made(most=10, warnings=warnings), warnings=warnings)
    given = served.client().completions.create(model="base", prompt="def", max_tokens=2)
    served.wait(lambda: served.metric("peftcore_records_dropped_total", reason="full") == 1)
    assert httpx.post(f"{served.url}/v1/feedback", json={"id": given.id, "rating": "up"}).status_code == 404
    assert "have reached 10 bytes" in httpx.get(f"{served.url}/ready").json()["warnings"]["recording"]
    assert served.client().completions.create(model="base", prompt="def", max_tokens=2).choices
