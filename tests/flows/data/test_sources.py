"""Rows with messages, or with prompt and completion, from any file; faulty ones are told by their line."""

import json
import re
import shutil
import sysconfig
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

from flows.base.hub import DownloadError
from flows.data import docstrings, sources
from flows.data.examples import Example
from flows.data.sources import read_examples
from flows.errors import DataError
from flows.params import Data, load_params

ROWS = [{"prompt": "One?", "completion": "1."}, {"prompt": "Two?", "completion": "NA"}]
CHAT = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "1."}]


def read(tmp_path: Path, source: str = "rows.jsonl", **options: Any) -> list[Example]:
    return read_examples(Data(source=source, **{"system_prompt": None, **options}), tmp_path)


def write_lines(tmp_path: Path, *rows: Any, name: str = "rows.jsonl") -> None:
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def as_files(tmp_path: Path) -> Path:
    """The same rows in each format."""
    write_lines(tmp_path, *ROWS)
    (tmp_path / "rows.csv").write_text("prompt,completion\nOne?,1.\nTwo?,NA\n")
    Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    return tmp_path


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_each_format_gives_the_same_chats(as_files: Path, suffix: str) -> None:
    examples = read(as_files, f"rows.{suffix}")
    assert [example.messages for example in examples] == [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        for row in ROWS
    ]


def test_a_folder_is_all_of_its_files(as_files: Path) -> None:
    (as_files / "README.md").write_text("not data")
    assert len(read(as_files, ".")) == 6


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    for answer in ("old", "new"):
        Dataset.from_list([{"prompt": "a", "completion": answer}]).to_parquet(tmp_path / "rows.parquet")
        assert read(tmp_path, "rows.parquet")[0].messages[-1]["content"] == answer


def test_messages_are_taken_as_they_are(tmp_path: Path) -> None:
    write_lines(tmp_path, {"messages": CHAT})
    assert read(tmp_path)[0].messages == CHAT


def test_messages_in_csv_are_json(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('messages\n"' + json.dumps(CHAT).replace('"', '""') + '"\n')
    assert read(tmp_path, "rows.csv")[0].messages == CHAT


def test_the_system_prompt_begins_a_chat_that_has_none(tmp_path: Path) -> None:
    own = [{"role": "system", "content": "Mine."}, *CHAT]
    write_lines(tmp_path, {"messages": CHAT}, {"messages": own}, ROWS[0])
    firsts = [example.messages[0]["content"] for example in read(tmp_path, system_prompt="Be brief.")]
    assert firsts == ["Be brief.", "Mine.", "Be brief."]


def test_groups_and_slices_are_columns(tmp_path: Path) -> None:
    write_lines(tmp_path, ROWS[0] | {"book": 3, "kind": "sum"}, ROWS[1] | {"book": 4, "kind": "sum"})
    examples = read(tmp_path, group_column="book", slice_column="kind")
    assert [(example.group, example.slice) for example in examples] == [("3", "sum"), ("4", "sum")]


def test_a_whole_number_is_one_group_also_as_a_float(tmp_path: Path) -> None:
    write_lines(tmp_path, ROWS[0] | {"book": 3}, ROWS[1] | {"book": 3.0}, ROWS[1] | {"book": 3.5})
    assert [example.group for example in read(tmp_path, group_column="book")] == ["3", "3", "3.5"]


def test_an_answer_beside_turns_is_named_as_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_lines(tmp_path, ROWS[0] | {"messages": CHAT}, {"messages": CHAT, "prompt": "One?"}, ROWS[1])
    read(tmp_path)
    warning = caplog.messages[-1]
    assert "1 rows have turns (messages or conversations) and also prompt and completion" in warning


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("chat", [{"prompt": f"Is {n} or {n * n}?", "completion": f"{n}."} for n in range(20)]),
        ("chat", [{"messages": [{"role": "user", "content": f"{n}?"}, CHAT[1]]} for n in range(20)]),
        ("preference", [{"prompt": f"Is {n}?", "chosen": f"{n}.", "rejected": "no"} for n in range(20)]),
        ("unpaired_preference", [{"prompt": f"Is {n}?", "completion": f"{n}.", "label": True} for n in range(20)]),
        ("classification", [{"text": f"Is {n}?", "label": "odd"} for n in range(20)]),
    ],
)
def test_without_a_group_column_a_rows_group_is_its_own_question_wherever_it_stands(
    tmp_path: Path, kind: str, rows: list[dict[str, Any]]
) -> None:
    write_lines(tmp_path, *rows)
    before = {example.group for example in read(tmp_path, kind=kind)}
    assert len(before) == 20
    write_lines(tmp_path, *rows[::-1])
    write_lines(tmp_path, *rows[:10], name="other.jsonl")
    system_prompt = None if kind == "classification" else "Be brief."
    assert {example.group for example in read(tmp_path, ".", kind=kind, system_prompt=system_prompt)} == before


def test_another_answer_or_spelling_is_of_the_same_group(tmp_path: Path) -> None:
    rows = [{"prompt": "caf\u00e9?", "completion": "1."}, {"prompt": " cafe\u0301? ", "completion": "2."}]
    write_lines(tmp_path, *rows)
    assert len({example.group for example in read(tmp_path)}) == 1


@pytest.mark.parametrize(
    ("options", "row", "hint"),
    [
        ({}, {"Prompt": "a", " completion ": "b"}, r"write 'Prompt', ' completion ' as prompt, completion: capitals"),
        ({}, {"prompt": "a", "Completion": "b"}, r"it has no completion; write 'Completion' as completion"),
        ({"kind": "classification"}, {"text": "a", "LABEL": "b"}, "write 'LABEL' as label"),
        ({"kind": "preference"}, {"prompt": "a", "Chosen": "b", "rejected": "c"}, "write 'Chosen' as chosen"),
        ({"group_column": "book"}, ROWS[0] | {"Book": 1}, "write 'Book' as book"),
    ],
)
def test_columns_that_are_spelled_otherwise_are_named(
    tmp_path: Path, options: dict[str, Any], row: dict[str, Any], hint: str
) -> None:
    write_lines(tmp_path, row)
    with pytest.raises(DataError, match=hint):
        read(tmp_path, **options)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"prompt": "a"}, "it has no completion"),
        ({"question": "a"}, "it has no answer"),
        ({"title": "a"}, "neither messages nor prompt and completion, but title"),
        ({"prompt": None, "completion": "b"}, "its prompt is null; give the row a question and an answer"),
        ({"messages": None, "prompt": None, "completion": None}, "its messages, prompt, completion are null"),
        ({"prompt": "a", "completion": ""}, "its completion is empty"),
        ({"prompt": "a", "completion": None}, "its completion is empty"),
        ({"prompt": "a", "completion": "  "}, "its completion is empty"),
        ({"prompt": 1, "completion": "b"}, "its prompt is no text, but 1; write it as text"),
        (
            {"prompt": CHAT[:1], "completion": CHAT[1:]},
            "its prompt is a list, not text; write all turns .* as messages",
        ),
        ({"prompt": "a", "completion": 0}, "its completion is no text, but 0; write it as text"),
        ({"messages": "not json"}, "its messages are no JSON"),
        ({"messages": {"role": "user"}}, "its messages are no list"),
        ({"messages": []}, "it has no completion"),
        ({"messages": CHAT[:1]}, "it has no completion: its last turn is not the assistant's"),
        ({"messages": CHAT[1:]}, "no user turn before"),
        ({"messages": [{"role": "human", "content": "a"}]}, "turn 1 has the role 'human'; give one of system, user"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": ""}]}, r"turn 2 \(assistant\) has no text"),
        ({"messages": [CHAT[0], {"role": "system", "content": "x"}, CHAT[1]]}, "system turn that is not the first"),
    ],
)
def test_a_faulty_row_is_told_by_its_line(tmp_path: Path, row: dict[str, Any], fault: str) -> None:
    write_lines(tmp_path, ROWS[0], row)
    with pytest.raises(DataError, match=rf"(?s)1 rows cannot be used.*\n  rows\.jsonl:2: .*{fault}"):
        read(tmp_path)


def test_faulty_rows_are_counted_and_the_first_listed(tmp_path: Path) -> None:
    write_lines(tmp_path, *[{"prompt": "a", "completion": ""}] * 25)
    with pytest.raises(DataError) as refused:
        read(tmp_path)
    lines = str(refused.value).splitlines()
    assert "25 rows" in lines[0]
    assert len(lines) == 12
    assert lines[-1] == "  ... and 15 more"


def test_an_absent_column_is_told_with_those_there_are(tmp_path: Path) -> None:
    write_lines(tmp_path, ROWS[0])
    with pytest.raises(DataError, match=r"no book \(data\.group_column\); its columns are prompt, completion"):
        read(tmp_path, group_column="book")


@pytest.mark.parametrize("column", ["group_column", "slice_column"])
@pytest.mark.parametrize("value", [None, float("nan"), "", " "])
def test_rows_without_a_value_are_no_group_and_no_slice(tmp_path: Path, column: str, value: Any) -> None:
    write_lines(tmp_path, ROWS[0] | {"book": 0}, ROWS[0] | {"book": value})
    with pytest.raises(DataError, match=rf"1 rows .*\n  rows\.jsonl:2: it has no book \(data\.{column}\)"):
        read(tmp_path, **{column: "book"})


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=f"{name}: it has no rows"):
        read(tmp_path, name)


def test_a_dataset_that_cannot_be_downloaded_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: str) -> Path:
        raise DownloadError("no network")

    monkeypatch.setattr(sources, "download", fail)
    with pytest.raises(DataError, match="hub:a/b: the download failed: no network"):
        read(tmp_path, "hub:a/b")


def test_a_dataset_of_the_hub_is_read_from_its_snapshot(monkeypatch: pytest.MonkeyPatch, as_files: Path) -> None:
    monkeypatch.setattr(sources, "download", lambda source, kind: as_files)
    assert len(read(as_files, "hub:a/b")) == 6


@pytest.mark.parametrize("key", ["quarantined", "new_files"])
def test_names_that_match_no_file_are_refused_with_the_files_there_are(as_files: Path, key: str) -> None:
    (as_files / "week2.jsonl").touch()  # a file without rows is a file
    assert len(read(as_files, ".", **{key: ["rows.csv", "week2.jsonl", "rows.parquet"]})) == 6
    with pytest.raises(
        DataError,
        match=rf"data\.{key} names row\.csv, rows\.parquet row 1, and data\.source \. has no such file; it has "
        r"rows\.csv, rows\.jsonl, rows\.parquet, week2\.jsonl; correct",
    ):
        read(as_files, ".", **{key: ["row.csv", "rows.csv", "rows.parquet row 1"]})


def test_a_file_of_a_mixture_is_named_with_its_source(as_files: Path) -> None:
    (as_files / "weeks").mkdir()
    write_lines(as_files, *ROWS, name="weeks/week1.jsonl")
    mixture = [{"source": "weeks", "name": "tickets"}, {"source": "rows.csv"}]

    def read_mixture(name: str) -> int:
        return len(read_examples(Data.model_validate({"mixture": mixture, "quarantined": [name]}), as_files))

    assert read_mixture("tickets/week1.jsonl") == read_mixture("rows/rows.csv") == 4
    for name in ("week1.jsonl", "weeks/week1.jsonl", "rows.csv"):
        with pytest.raises(DataError, match=rf"names {name}, .*it has tickets/week1\.jsonl, rows/rows\.csv;"):
            read_mixture(name)


def test_the_demonstration_has_modules_in_place_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "library"  # some modules, because reading all takes seconds
    library.mkdir()
    modules = ("ast", "bisect", "calendar", "copy", "glob", "heapq", "inspect", "os", "random", "shlex", "shutil")
    for name in (*modules, "textwrap"):
        shutil.copy(Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py", library)
    monkeypatch.setattr(docstrings, "sysconfig", SimpleNamespace(get_paths=lambda: {"stdlib": str(library)}))
    read(tmp_path, "stdlib:docstrings", quarantined=["textwrap"])
    with pytest.raises(DataError, match=r"names textwra, .*; it has .* and \d+ more; correct"):
        read(tmp_path, "stdlib:docstrings", quarantined=["textwra"])


def test_further_columns_are_taken_for_scorers(tmp_path: Path) -> None:
    write_lines(tmp_path, *(row | {"tests": ["a", n], "level": None} for n, row in enumerate(ROWS)))
    examples = read(tmp_path, extra_columns=["tests", "level"])
    assert [json.loads(example.extra or "") for example in examples] == [
        {"tests": ["a", n], "level": None} for n in range(len(ROWS))
    ]
    assert [example.extra for example in read(tmp_path)] == [None] * len(ROWS)
    with pytest.raises(DataError, match=r"it has no test \(data.extra_columns\); its columns are prompt, completion, "):
        read(tmp_path, extra_columns=["test"])


GUIDES = Path(__file__).parents[3] / "docs" / "how-to"
DOCUMENTED = "\n".join((GUIDES / name).read_text() for name in ("data.md", "plain-text.md", "several-sources.md"))


@pytest.mark.parametrize("line", re.findall(r"^\{.*\}$", DOCUMENTED, re.MULTILINE))
def test_each_row_of_the_documentation_is_read(tmp_path: Path, line: str) -> None:
    (tmp_path / "rows.jsonl").write_text(line + "\n")
    row = json.loads(line)
    kind: Any = "preference" if "preferred_output" in row or "chosen" in row else "text" if "text" in row else "chat"
    (example,) = read_examples(Data(source="rows.jsonl", kind=kind), tmp_path)
    assert example.where == "rows.jsonl:1"


@pytest.mark.parametrize("text", re.findall(r"```yaml\n(.+?)```", DOCUMENTED, re.DOTALL))
def test_the_parameters_of_the_documentation_are_accepted(tmp_path: Path, text: str) -> None:
    (tmp_path / "params.yaml").write_text(text)
    assert load_params(tmp_path / "params.yaml").data.source != "stdlib:docstrings"
