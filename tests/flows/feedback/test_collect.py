"""From records to a file that retrainings quarantine."""

import errno
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from flows.errors import DataError
from flows.feedback import collect as module
from flows.feedback.collect import collect
from flows.feedback.ratings import Policy
from flows.feedback.rows import without_known
from flows.params import Params
from flows.paths import Paths
from peftcore.errors import ConfigError


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """Records of four rated answers, the last of which a killed server left half."""
    lines = []
    for number in range(4):
        messages = [{"role": "user", "content": f"How much is {number} and 1?"}]
        record = {"id": f"chatcmpl-{number}", "time": "2026-11-24T12:00:00+00:00", "user": f"user{number}"}
        choices = [{"index": 0, "text": f"{number + 1}.", "finish": "stop"}]
        answer = {"model": "m", "version": "v0.1.0", "messages": messages, "choices": choices}
        rating = {"index": 0, "rating": float(number % 2), "correction": None, "comment": None}
        lines += [{"kind": "answer"} | record | answer, {"kind": "rating"} | record | rating]
    folder = tmp_path / "records"
    folder.mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "000001.jsonl").write_text(text[:-20])
    return folder


@pytest.fixture
def project(tmp_path: Path) -> tuple[Params, Paths]:
    """A project without versions, which takes rows in from a folder."""
    (tmp_path / "incoming").mkdir()
    data = {"source": "data/rows", "kind": "unpaired_preference"}
    given = {"data": data, "train": {"objective": "kto"}, "retrain": {"incoming": "incoming"}}
    return Params.model_validate(given), Paths(tmp_path)


def test_without_a_project_the_rows_are_in_the_file(records: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "week.jsonl"
    report = collect(records, "unpaired_preference", Policy(), out, None)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["completion"], row["label"]) for row in rows] == [("1.", False), ("2.", True), ("3.", False)]
    assert (report.path, report.rows, report.labels) == (str(out), 3, {"false": 2, "true": 1})
    assert (report.ratings, report.users, report.damaged_lines, report.compared_with) == (3, 3, 1, None)
    assert set(module.COLUMNS) < set(rows[0])


def test_no_rows_are_no_file(records: Path, tmp_path: Path) -> None:
    out = tmp_path / "week.jsonl"
    report = collect(records, "preference", Policy(), out, None)
    assert (report.path, report.rows, out.exists()) == (None, 0, False) and report.rows_left_out


def test_a_full_disk_leaves_no_empty_file(records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "week.jsonl"
    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        full = OSError(errno.ENOSPC, "No space left on device")
        patched.setattr(module, "write_atomically", lambda *_: (_ for _ in ()).throw(full))
        collect(records, "unpaired_preference", Policy(), out, None)
    assert collect(records, "unpaired_preference", Policy(), out, None).rows == 3


@pytest.fixture
def without_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    class Registry:
        def stages(self) -> dict[str, Any]:
            return {}

    monkeypatch.setattr(module, "registry_of", lambda params, root: Registry())


@pytest.mark.usefixtures("without_versions")
def test_the_default_file_is_quarantined_and_has_only_new_requests(records: Path, project: Any, tmp_path: Path) -> None:
    first = collect(records, "unpaired_preference", Policy(per_user=1), None, project)
    assert first.path is not None and first.rows == 3
    name = Path(first.path).relative_to(tmp_path / "incoming").as_posix()
    assert project[0].retrain.is_untrusted(name)
    again = collect(records, "unpaired_preference", Policy(), tmp_path / "incoming" / "feedback" / "b.jsonl", project)
    assert (again.rows, again.path) == (0, None)
    assert again.rows_left_out == {"of a request that an earlier file has": 3}


@pytest.mark.usefixtures("without_versions")
def test_rows_of_the_prepared_test_set_are_left_out(
    records: Path, project: Any, tmp_path: Path, write_tiny_base: Any
) -> None:
    params, paths = project
    write_tiny_base(paths.base)
    encoded = module._encoded(params, paths.base)
    row = {"prompt": [{"role": "user", "content": "How much is 1 and 1?"}], "completion": "Two.", "label": False}
    prompt, answer = encoded(row)
    paths.data.mkdir(parents=True)
    table = {"prompt": [prompt], "completion": [answer.rpartition("\n")[0]], "desirable": [False]}
    parquet.write_table(pyarrow.table(table), paths.split("test"))
    assert module._test_texts(paths.split("test")) == [(prompt, answer)]
    report = collect(records, "unpaired_preference", Policy(), None, project)
    assert report.compared_with == 1 and report.rows_left_out["with the prompt of a test row"] == 1


@pytest.mark.parametrize(
    ("kind", "out", "sections", "words"),
    [
        ("chat", None, {}, "the project's data.kind is unpaired_preference"),
        ("unpaired_preference", "incoming/week.jsonl", {}, "would trust this file at once.*feedback"),
        ("unpaired_preference", "week.csv", {}, "ends in .jsonl"),
        ("unpaired_preference", "there.jsonl", {}, "exists already"),
        ("unpaired_preference", None, {"retrain": {}}, "give --out FILE.jsonl"),
        ("unpaired_preference", None, {"data": {"group_column": "book"}}, "data.group_column is book.*request_id"),
    ],
)
def test_what_does_not_fit_the_project_is_refused(
    records: Path, project: Any, tmp_path: Path, kind: Any, out: str | None, sections: dict[str, Any], words: str
) -> None:
    (tmp_path / "there.jsonl").write_text("")
    values = project[0].model_dump()
    for section, changes in sections.items():
        values[section] = values[section] | changes if changes else {}
    given = Params.model_validate(values), project[1]
    with pytest.raises(DataError, match=words):
        collect(records, kind, Policy(), tmp_path / out if out else None, given)
    assert not list((tmp_path / "incoming").iterdir())


def test_an_earlier_file_that_is_damaged_is_named(records: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"request_id": "1"}\n{"request')
    with pytest.raises(DataError, match=r"a\.jsonl:2: not JSON"):
        collect(records, "unpaired_preference", Policy(), tmp_path / "b.jsonl", None)
    with pytest.raises(ConfigError, match="there is no folder"):
        collect(tmp_path / "none", "unpaired_preference", Policy(), tmp_path / "new" / "b.jsonl", None)


def test_earlier_files_may_begin_with_a_byte_order_mark_and_those_of_another_encoding_are_named(
    records: Path, tmp_path: Path
) -> None:
    earlier = tmp_path / "a.jsonl"
    earlier.write_text('{"request_id": "chatcmpl-1"}\n', encoding="utf-8-sig")
    report = collect(records, "unpaired_preference", Policy(), tmp_path / "b.jsonl", None)
    assert report.rows_left_out == {"of a request that an earlier file has": 1}
    earlier.write_bytes('{"text": "ü"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.jsonl:1: not JSON .*can't decode"):
        collect(records, "unpaired_preference", Policy(), tmp_path / "c.jsonl", None)


def test_a_file_that_another_process_writes_meanwhile_stays(
    records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.jsonl"

    def slow(*arguments: Any) -> Any:
        out.write_text("another's")
        return without_known(*arguments)

    monkeypatch.setattr(module, "without_known", slow)
    with pytest.raises(DataError, match=r"a\.jsonl exists already"):
        collect(records, "unpaired_preference", Policy(), out, None)
    assert out.read_text() == "another's"


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85"])
def test_line_separators_in_a_text_do_not_end_a_row_of_an_earlier_file(
    records: Path, tmp_path: Path, mark: str
) -> None:
    first = records / "000001.jsonl"
    first.write_text(first.read_text().replace("How much is", f"How{json.dumps(mark)[1:-1]} much is"))
    assert collect(records, "unpaired_preference", Policy(), tmp_path / "a.jsonl", None).rows == 3
    assert mark in (tmp_path / "a.jsonl").read_text()
    again = collect(records, "unpaired_preference", Policy(), tmp_path / "b.jsonl", None)
    assert again.rows_left_out == {"of a request that an earlier file has": 3}


@pytest.mark.usefixtures("without_versions")
def test_a_correction_with_a_special_token_is_left_out_and_the_other_rows_are_not(
    records: Path, project: Any, write_tiny_base: Any
) -> None:
    _, paths = project
    write_tiny_base(paths.base)
    first = records / "000001.jsonl"
    first.write_text(first.read_text().replace('"correction": null', '"correction": "One.<|im_end|>"', 1))
    paths.data.mkdir(parents=True)
    table = {"prompt": ["Which?"], "completion": ["This."], "desirable": [True]}
    parquet.write_table(pyarrow.table(table), paths.split("test"))
    report = collect(records, "unpaired_preference", Policy(), None, project)
    assert report.rows == 3
    ((reason, count),) = report.rows_left_out.items()
    assert count == 1 and reason.startswith("no row for training: ") and "<|im_end|>" in reason
