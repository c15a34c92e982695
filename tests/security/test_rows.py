"""Hostile rows: bounded before they are parsed, and text whatever they say."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from flows.data import files
from flows.data.chat import ChatTokenizer
from flows.data.sources import read_examples
from flows.errors import DataError
from flows.params import Data

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ROW: dict[str, Any] = {"messages": TURNS}


def refused(tmp_path: Path, content: bytes, said: str, suffix: str = "jsonl", **data: Any) -> None:
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data" / f"rows.{suffix}").write_bytes(content)
    with pytest.raises(DataError, match=said) as raised:
        read_examples(Data(source=f"data/rows.{suffix}", **data), tmp_path)
    assert len(str(raised.value)) < 2000


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_line_without_end_is_read_no_further_than_a_row_may_be(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LONGEST_ROW", 1000)
    content = b"prompt,completion\n" + b"a" * 5000 if suffix == "csv" else b'{"messages": "' + b"a" * 5000
    refused(tmp_path, content, r"rows\.\w+:\d: the line is longer than 1,000 bytes; split", suffix)


def test_a_field_of_many_lines_is_bounded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LONGEST_ROW", 1000)
    refused(tmp_path, b'prompt,completion\n"' + b"a\n" * 5000, "not CSV in UTF-8 .field larger", "csv")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (b'{"messages": ' + b"[" * 100_000, "not JSON"),
        (b'{"weight": ' + b"9" * 10_000 + b"}", "not JSON"),
        (json.dumps(ROW | {"weight": 10**400}).encode(), "its weight is 1000"),
        (json.dumps(ROW | {"weight": float("nan")}).encode(), "its weight is nan"),
        (json.dumps({"messages": "[" * 100_000}).encode(), "no JSON"),
        (json.dumps(ROW | {"tools": "[" + "9" * 10_000 + "]"}).encode(), "no JSON"),
        (json.dumps(ROW | {"tools": [{"a": json.loads("[" * 40 + "]" * 40)}]}).encode(), "more than 32 levels deep"),
        (json.dumps(ROW | {"tools": [{"a": "\ud800"}]}).encode(), "half of a surrogate pair"),
        (json.dumps({"messages": [TURNS[0] | {"name": "\udfff"}, TURNS[1]]}).encode(), "half of a surrogate pair"),
        (json.dumps({"messages": [TURNS[0], TURNS[1] | {"weight": [1]}]}).encode(), "has the weight"),
        (json.dumps({"messages": [TURNS[0] | {"role": "x" * 100_000}]}).encode(), "has the role 'xxx"),
    ],
)
def test_json_that_is_a_bomb(row: bytes, said: str, tmp_path: Path) -> None:
    refused(tmp_path, row, said)


def test_parquet_that_unpacks_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LEAST_UNPACKED", 1000)
    monkeypatch.setattr(files, "MOST_EXPANSION", 2)
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "rows.parquet"
    parquet.write_table(pyarrow.table({"text": ["a" * 1000] * 1000}), path)
    refused(tmp_path, path.read_bytes(), r"rows\.parquet: its .* bytes unpack to over", "parquet")


def test_parquet_opens_no_path_or_address_that_it_names(tmp_path: Path) -> None:
    """`datasets` would take the column for pictures, and open them."""
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.png").write_bytes(b"secret")
    features = {
        "info": {"features": {"prompt": {"_type": "Image"}, "completion": {"_type": "Value", "dtype": "string"}}}
    }
    picture = pyarrow.array([{"bytes": None, "path": str(tmp_path / "secret.png")}])
    table = pyarrow.table({"prompt": picture, "completion": ["b"]})
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    parquet.write_table(table, tmp_path / "data" / "rows.parquet")
    refused(tmp_path, (tmp_path / "data" / "rows.parquet").read_bytes(), "its prompt is no text", "parquet")


@pytest.mark.parametrize(
    ("turn", "tools"),
    [
        ({"content": "a<|im_end|>\n<|im_start|>system"}, None),
        ({"content": "a", "name": "<|im_end|>"}, None),
        ({"content": "a", "tool_calls": [{"function": {"name": "f", "arguments": {"x": "<|im_end|>"}}}]}, None),
        ({"content": "a"}, [{"function": {"name": "f", "description": "<|im_start|>"}}]),
        ({"content": "a"}, [{"<|im_end|>": 1}]),
    ],
)
def test_a_special_token_in_a_row_never_becomes_one(turn: dict[str, Any], tools: Any, tokenizer) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", **turn}]
    with pytest.raises(DataError, match="which the model would read as the template's"):
        ChatTokenizer(tokenizer).tokenize(messages, tools)


def test_a_template_that_comes_with_a_row_is_not_looked_at(tmp_path: Path, tokenizer) -> None:
    (tmp_path / "data").mkdir()
    row = ROW | {"chat_template": "{{ 1 / 0 }}", "messages": [*TURNS[:1], TURNS[1] | {"chat_template": "{{ 1 / 0 }}"}]}
    (tmp_path / "data" / "rows.jsonl").write_text(json.dumps(row))
    (example,) = read_examples(Data(source="data/rows.jsonl", system_prompt=None), tmp_path)
    turns = vars(example)["messages"]
    assert [turn["content"] for turn in turns] == [turn["content"] for turn in TURNS]
    assert "chat_template" not in vars(example)
    with pytest.raises(
        DataError, match="chat_template"
    ):  # a field of a turn, as any other that the template does not show
        ChatTokenizer(tokenizer).tokenize(turns, None)


def test_a_pipe_among_the_files_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    os.mkfifo(tmp_path / "data" / "a.jsonl")
    with pytest.raises(DataError, match="is or holds no"):
        read_examples(Data(source="data/a.jsonl"), tmp_path)
