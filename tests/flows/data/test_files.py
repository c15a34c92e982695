"""Files that are absent, of another kind or damaged are refused with their name, and their line if there is one."""

import bz2
import gzip
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from flows.data.files import read_rows, row_files
from flows.errors import DataError


def rows(place: Path) -> list[tuple[str, dict]]:
    return list(read_rows(place, "here"))


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.source here: there is no .*rows\.jsonl; give"):
        rows(tmp_path / "rows.jsonl")


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=r"is or holds no \.jsonl, \.csv, \.parquet"):
        rows(tmp_path)


def test_bad_json_is_told_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": \n')
    with pytest.raises(DataError, match=r"^rows\.jsonl:3: not JSON"):
        rows(path)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b'{}\n{"prompt": "\xff\xfe"}\n', 2),
        ('{"prompt": "a"}\n'.encode("utf-16"), 1),  # as Windows' PowerShell writes
    ],
)
def test_bytes_that_are_no_text_are_told_by_their_line(content: bytes, line: int, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"^rows\.jsonl:{line}: not JSON in UTF-8 .*; write the file in UTF-8"):
        rows(path)


@pytest.mark.parametrize(
    ("compress", "kind"), [(gzip.compress, "gzip"), (bz2.compress, "bzip2"), (lzma.compress, "xz")]
)
def test_a_compressed_file_is_told_as_one(tmp_path: Path, compress: Callable[[bytes], bytes], kind: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(compress(b'{"a": 1}\n'))
    with pytest.raises(DataError, match=rf"rows\.jsonl: the file is compressed \({kind}\); unpack it"):
        rows(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("rows.jsonl", '{"a": 1}\n')
    with pytest.raises(DataError, match=r"compressed \(zip\)"):
        rows(path)


def test_a_byte_order_mark_alone_is_no_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\r\n")
    assert rows(path) == []


def test_two_values_of_one_name_are_told(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": {"x": 1}, "b": {"x": 2}}\n{"a": [{"x": 1, "y": 2, "x": 3}]}\n')
    with pytest.raises(DataError, match=r"^rows\.jsonl:2: not JSON \(several fields are called x\); correct"):
        rows(path)
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], ["prompt"] * 2), path)
    with pytest.raises(DataError, match=r"^rows\.parquet: several columns are called prompt; rename all but one"):
        rows(path)


def test_a_row_that_is_no_object_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("[1]\n")
    with pytest.raises(
        DataError, match=r"^rows\.jsonl:1: a row is a JSON object, and this is list; write one object a"
    ):
        rows(path)


@pytest.mark.parametrize("text", ['{\n  "prompt": "a"\n}\n', '\ufeff[\r\n{"prompt": "a"}\r\n]\r\n'])
def test_json_of_several_lines_is_told_how_to_write_it(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=r"^rows\.jsonl:1: it begins a JSON value of several lines; write one object a"):
        rows(path)


@pytest.mark.parametrize("row", [r'{"text": "a\ud800"}', r'{"group": ["\uDFFF"]}', r'{"\ud800": 1}'])
def test_half_a_surrogate_pair_is_told_by_its_line(tmp_path: Path, row: str) -> None:
    (tmp_path / "rows.jsonl").write_text(f'{{"text": "\\ud83d\\ude00 \\u00e9"}}\n{row}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2: it holds half of a surrogate pair"):
        list(read_rows(tmp_path / "rows.jsonl", "rows.jsonl"))


@pytest.mark.parametrize("content", [b"PAR1 not parquet", b"\x00\x01"])
def test_damaged_parquet_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"^rows\.parquet: not Parquet"):
        rows(path)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("prompt,completion\na,b\na,b,c,d\n", "3: its columns differ from the header's"),
        ("prompt,completion\na\n", "2: its columns differ from the header's"),
        ('prompt,completion\na,"b\n', "2: not CSV in UTF-8"),
        ('prompt,completion\n"a \\" b",c\n', r'2: not CSV in UTF-8 .*is written twice \(""\)'),
        ("prompt,prompt,completion\na,b,c\n", "1: several columns are called prompt; rename all but one"),
    ],
)
def test_bad_csv_is_told_by_its_line(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"^rows\.csv:{fault}"):
        rows(path)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_csv_of_another_encoding_is_told_by_its_line(tmp_path: Path, encoding: str) -> None:
    lines = ["text,label", *(f"row {number},1" for number in range(2000))]
    lines[1500] = "café,1"
    (tmp_path / "rows.csv").write_text("\n".join(lines), encoding=encoding)
    line = {"latin-1": 1501, "utf-16": 1}[encoding]
    with pytest.raises(DataError, match=rf"^rows\.csv:{line}: not UTF-8 .*; write the file in UTF-8"):
        rows(tmp_path / "rows.csv")


def test_arguments_of_calls_in_parquet_are_those_of_the_call(tmp_path: Path) -> None:
    def calls(name: str, arguments: dict) -> dict:
        return {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}

    def tool(name: str, properties: dict) -> dict:
        return {"function": {"name": name, "parameters": {"properties": properties}}}

    tools = [tool("weather", {"city": {"type": "string"}}), tool("mail", {"to": {"enum": ["a", "b"]}})]
    written = [
        {"messages": [calls("weather", {"city": "Oslo"})], "tools": tools, "extra": [{"a": 1, "b": None}]},
        {"messages": [calls("mail", {"to": "a"})], "tools": tools, "extra": [{"a": None, "b": 2}]},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(written), tmp_path / "rows.parquet")
    assert [row for _, row in rows(tmp_path / "rows.parquet")] == written


def test_columns_of_csv_without_a_name_may_be_several(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,completion,,\na,b,,\n")
    assert rows(tmp_path / "rows.csv") == [("rows.csv:2", {"prompt": "a", "completion": "b", "": ""})]


def test_a_row_of_csv_may_span_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\n"a\nb",1\n')
    assert rows(path) == [("rows.csv:3", {"prompt": "a\nb", "completion": "1"})]


def test_files_of_a_folder_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b", "a", "sub/c"):
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}\n")
    assert [where for where, _ in rows(tmp_path)] == ["a.jsonl:1", "b.jsonl:1", "sub/c.jsonl:1"]


@pytest.mark.parametrize("mark", [";", "\t", ","])
def test_csv_may_be_divided_as_other_programs_write_it(tmp_path: Path, mark: str) -> None:
    (tmp_path / "rows.csv").write_text(f'\ufeffprompt{mark}completion\n"a{mark}b"{mark}1\n', encoding="utf-8")
    assert rows(tmp_path / "rows.csv") == [("rows.csv:2", {"prompt": f"a{mark}b", "completion": "1"})]


def test_capitals_of_a_suffix_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "rows.JSONL").write_text("{}\n")
    (tmp_path / "rows.Csv").write_text("a\n1\n")
    assert [where for where, _ in rows(tmp_path)] == ["rows.Csv:2", "rows.JSONL:1"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [("rows.json", "one row a line as .jsonl"), ("rows.jsonl.gz", "unpack it"), ("rows.XLSX", "write it as .csv")],
)
def test_files_that_are_not_read_are_named_with_what_to_do(
    tmp_path: Path, name: str, hint: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / name).write_text("[]")
    for place in (tmp_path, tmp_path / name):
        with pytest.raises(DataError, match=rf"{name}: .*{hint}"):
            rows(place)
    (tmp_path / "README.md").touch()
    (tmp_path / "other.jsonl").write_text("{}\n")
    assert len(rows(tmp_path)) == 1
    assert [record.message for record in caplog.records if "not read" in record.message] == [caplog.records[-1].message]
    assert f"{name}: " in caplog.text and hint in caplog.text and "README" not in caplog.text


def test_hidden_files_of_a_folder_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in (".DS_Store", "._rows.jsonl", ".ipynb_checkpoints/rows-checkpoint.jsonl", "more/.rows.csv.swp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07")
    with pytest.raises(DataError, match=r"\._rows\.jsonl, \.ipynb_checkpoints/rows-checkpoint\.jsonl: it is hidden"):
        rows(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n')
    assert rows(tmp_path) == [("rows.jsonl:1", {"a": 1})]
    assert list(row_files(tmp_path)) == ["rows.jsonl"]
    (record,) = caplog.records
    assert record.message.endswith("rename it if it holds rows") and "DS_Store" not in record.message
    hidden = tmp_path / ".cache" / "rows.jsonl"  # below a hidden folder that was named itself
    hidden.parent.mkdir()
    (tmp_path / "rows.jsonl").rename(hidden)
    assert rows(hidden) == rows(hidden.parent) == [("rows.jsonl:1", {"a": 1})]


@pytest.mark.parametrize(
    "values",
    [
        pyarrow.array([2**62], pyarrow.timestamp("us")),
        pyarrow.array([2**62], pyarrow.duration("s")),
        pyarrow.array([1], pyarrow.timestamp("us", "Mars/Base")),
    ],
)
def test_values_that_python_lacks_are_told_by_their_column(tmp_path: Path, values: pyarrow.Array) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"prompt": ["a"], "time": values}), path)
    with pytest.raises(
        DataError, match=r"^rows\.parquet: values of the column time cannot be read .*; leave the column"
    ):
        rows(path)


def test_text_files_are_read_for_texts_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("One.\n\nTwo.")
    (tmp_path / "rows.jsonl").write_text('{"text": "Three."}\n')
    assert [row for _, row in read_rows(tmp_path, ".")] == [{"text": "Three."}]
    assert [row["text"] for _, row in read_rows(tmp_path, ".", "text")] == ["One.\n\nTwo.", "Three."]
    (tmp_path / "notes.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"notes\.txt: not text in UTF-8"):
        list(read_rows(tmp_path, ".", "text"))


CONLL = """-DOCSTART- -X- -X- O

Ada NNP B-PER
wrote VBD O

London\tB-LOC
"""


def test_a_no_break_space_is_part_of_a_word_of_conll(tmp_path: Path) -> None:
    (tmp_path / "rows.conll").write_text("10\u00a0000\tB-NUM\neuros O\n\u00a0\n", encoding="utf-8")
    expected = {"tokens": ["10\u00a0000", "euros"], "tags": ["B-NUM", "O"]}
    assert [row for _, row in read_rows(tmp_path, ".", "token_classification")] == [expected]


def test_a_conll_file_has_a_row_for_each_sentence(tmp_path: Path) -> None:
    (tmp_path / "news.conll").write_text(CONLL)
    rows = list(read_rows(tmp_path / "news.conll", "news.conll", "token_classification"))
    assert rows == [
        ("news.conll:3", {"tokens": ["Ada", "wrote"], "tags": ["B-PER", "O"]}),
        ("news.conll:6", {"tokens": ["London"], "tags": ["B-LOC"]}),
    ]


def test_a_word_without_a_tag_is_told_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "news.conll").write_text("Ada B-PER\nwrote\n")
    with pytest.raises(DataError, match=r"news.conll:2: it has a word without a tag; write both"):
        list(read_rows(tmp_path, "news", "token_classification"))


def test_conll_files_are_read_for_tags_alone(tmp_path: Path) -> None:
    (tmp_path / "news.conll").write_text(CONLL)
    with pytest.raises(DataError, match=r"is or holds no \.jsonl, \.csv, \.parquet;"):
        list(read_rows(tmp_path, "news", "chat"))
