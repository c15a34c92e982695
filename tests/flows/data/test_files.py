"""Files that are absent, of another kind or damaged are refused with their name, and their line if there is one."""

from pathlib import Path

import pytest

from flows.data.files import read_rows
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


def test_bytes_that_are_no_text_are_told_by_their_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{}\n{"prompt": "\xff\xfe"}\n')
    with pytest.raises(DataError, match=r"^rows\.jsonl:2: not JSON"):
        rows(path)


def test_a_row_that_is_no_object_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("[1]\n")
    with pytest.raises(DataError, match=r"^rows\.jsonl:1: a row is a JSON object, and this is list"):
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
        ("prompt,completion\na,b\na,b,c,d\n", "3: it has other columns than the header"),
        ("prompt,completion\na\n", "2: it has other columns than the header"),
        ('prompt,completion\na,"b\n', r"\d: not CSV in UTF-8"),
    ],
)
def test_bad_csv_is_told_by_its_line(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"^rows\.csv:{fault}"):
        rows(path)


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
