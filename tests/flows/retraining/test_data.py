"""Files that come in: which are taken, under which names, which are news, and what is said of the rest."""

import os
from pathlib import Path
from typing import Any

import pytest

from flows.base.hub import DownloadError
from flows.errors import DataError
from flows.params import Params
from flows.registry.registry import Version
from flows.retraining import data
from flows.retraining.data import Collected, Source

GOOD = "good\n"


def version(number: str) -> Version:
    return Version(number, f"docstrings@{number}", number, 0, "")


class Registered(Source):
    """A source whose versions are a dictionary: {version: its files}."""

    known: dict[str, dict[str, str]]
    judged_without: dict[str, dict[str, str]]

    def files_of(self, version: Version) -> dict[str, str]:
        return self.known.get(version.number, {})

    def listed_files(self, version: Version) -> dict[str, str]:
        return self.known.get(version.number, {})

    def quarantined_of(self, version: Version) -> dict[str, str]:
        return self.judged_without.get(version.number, {})


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registered:
    """A source without git or DVC, with a folder `incoming`; `kept` is what the newest version has."""
    (tmp_path / "incoming").mkdir()
    (tmp_path / "kept").mkdir()
    given: dict[str, Any] = {"data": {"source": "data/rows"}, "retrain": {"incoming": "incoming"}}
    made = Registered(Params.model_validate(given), tmp_path, tmp_path)
    made.known, made.judged_without = {}, {}

    class Tracked:
        def __init__(self, _: Path) -> None: ...

        def run(self, *_: str) -> str:
            return ""

    def get(_root: Path, _commit: str, _name: str, out: Path) -> None:
        out.mkdir(parents=True)
        for path in (tmp_path / "kept").iterdir():
            (out / path.name).write_bytes(path.read_bytes())

    monkeypatch.setattr(data, "Git", Tracked)
    monkeypatch.setattr(data, "get_output", get)
    return made


def collect(source: Registered, champion: str | None = None, trusted: tuple[str, ...] = ()) -> Collected:
    before = [version(number) for number in reversed(source.known)]
    collected = source.collect(before, version(champion) if champion else None, {}, trusted)
    for path in source.place.iterdir():  # as `keep` does
        (source.root / "kept" / path.name).write_bytes(path.read_bytes())
    return collected


def drop(source: Registered, name: str, text: str = GOOD) -> None:
    (source.root / "incoming" / name).write_text(text)


def texts(source: Registered) -> list[str]:
    return sorted(path.read_text() for path in source.place.iterdir())


def test_capitals_of_a_suffix_do_not_count(source: Registered) -> None:
    drop(source, "week1.JSONL")
    drop(source, "week2.Csv")
    found = collect(source)
    assert (sorted(found.files), found.skipped) == (["week1.JSONL", "week2.Csv"], {})


def test_what_is_not_taken_is_named_with_the_reason(source: Registered) -> None:
    incoming = source.root / "incoming"
    for name in ("week1.jsonl", "week2.json", "week3.jsonl.gz", "notes.md", ".hidden", "._week1.jsonl", "export"):
        drop(source, name)
    (incoming / "link.jsonl").symlink_to(incoming / "week1.jsonl")
    drop(source, "week\u2028.jsonl")
    Path(os.fsdecode(os.fsencode(incoming) + b"/week\xff.jsonl")).write_text(GOOD)
    os.mkfifo(incoming / "pipe.jsonl")
    found = collect(source)
    assert list(found.files) == ["week1.jsonl"]
    reasons = {name: why.partition(";")[0] for name, why in found.skipped.items()}
    unprintable = "its name has a character that is not printable, or not in UTF-8"
    assert reasons == {
        "._week1.jsonl": "it is hidden (a name with a dot first)",
        "export": "it is not .jsonl, .csv or .parquet",
        "link.jsonl": "it is a link",
        "pipe.jsonl": "it is not a regular file",
        "week2.json": "write one row a line as .jsonl (`jq -c '.[]' FILE.json > FILE.jsonl`)",
        "week3.jsonl.gz": "unpack it",
        r"'week\u2028.jsonl'": unprintable,
        r"'week\udcff.jsonl'": unprintable,
    }


@pytest.mark.parametrize("name", [b"week\xff.jsonl", "week\u2028.jsonl".encode(), b"a\nb.jsonl"])
def test_a_name_that_no_list_can_hold_is_refused_in_a_folder_of_the_repository(source: Registered, name: bytes) -> None:
    source.place.mkdir(parents=True)
    Path(os.fsdecode(os.fsencode(source.place) + b"/" + name)).write_text(GOOD)
    with pytest.raises(DataError, match=r"data\.source data/rows: the name of '.*' has a character.*rename it"):
        source._files()


def test_a_list_that_an_older_release_wrote_with_such_a_name_is_read(monkeypatch: Any, tmp_path: Path) -> None:
    class Shown:
        def __init__(self, _: Path) -> None: ...

        def show(self, *_: str) -> str:
            return "0  week\u2028.jsonl\n1  b.jsonl\n"

    monkeypatch.setattr(data, "Git", Shown)
    source = Source(Params.model_validate({"data": {"source": "data/rows"}}), tmp_path, tmp_path)
    assert source.files_of(version("v0.1.0")) == {"week\u2028.jsonl": "0", "b.jsonl": "1"}


def test_a_name_that_is_used_again_keeps_the_rows_of_before(
    source: Registered, caplog: pytest.LogCaptureFixture
) -> None:
    drop(source, "rows.jsonl", "first\n")
    source.known["v0.1.0"] = collect(source).files
    drop(source, "rows.jsonl", "second\n")
    found = collect(source, "v0.1.0")
    assert texts(source) == ["first\n", "second\n"]
    (name,) = found.new_files
    assert name.startswith("rows-") and name.endswith(".jsonl")
    assert f"both are kept, this as {name}" in caplog.text
    # the folder is not emptied: the same again is no news, and not said again
    source.known["v0.1.1"] = found.files
    caplog.clear()
    again = collect(source, "v0.1.0")
    assert (again.files, again.new_files, caplog.text) == (found.files, [], "")


def test_a_file_that_is_only_added_to_takes_its_own_place(source: Registered, caplog: pytest.LogCaptureFixture) -> None:
    drop(source, "rows.jsonl", "first\n")
    source.known["v0.1.0"] = collect(source).files
    drop(source, "rows.jsonl", "first\nsecond\n")
    assert collect(source, "v0.1.0").new_files == ["rows.jsonl"]
    assert (texts(source), caplog.text) == (["first\nsecond\n"], "")


def test_a_name_that_is_used_again_may_replace(source: Registered, caplog: pytest.LogCaptureFixture) -> None:
    given: dict[str, Any] = {"data": {"source": "data/rows"}}
    source.params = Params.model_validate(given | {"retrain": {"incoming": "incoming", "same_name": "replace"}})
    drop(source, "rows.jsonl", "first\n")
    source.known["v0.1.0"] = collect(source).files
    drop(source, "rows.jsonl", "second\n")
    assert collect(source, "v0.1.0").new_files == ["rows.jsonl"]
    assert texts(source) == ["second\n"]
    assert "replaces another file of this name" in caplog.text


def test_a_week_whose_candidate_was_refused_is_still_not_learned_by_the_champion(source: Registered) -> None:
    drop(source, "week1.jsonl", "1\n")
    source.known["v0.1.0"] = collect(source).files
    drop(source, "week2.jsonl", "2\n")
    source.known["v0.1.1"] = collect(source, "v0.1.0").files  # refused
    drop(source, "week3.jsonl", "3\n")
    found = collect(source, "v0.1.0")
    assert (found.new_files, found.new_to_champion) == (["week3.jsonl"], ["week2.jsonl", "week3.jsonl"])
    source.judged_without["v0.1.0"] = {"week1.jsonl": found.files["week1.jsonl"]}
    assert "week1.jsonl" in collect(source, "v0.1.0", (found.files["week1.jsonl"],)).new_to_champion


def test_a_hubs_new_revision_is_news_and_the_one_that_is_read(monkeypatch: Any, tmp_path: Path) -> None:
    revision = ["a" * 40]
    monkeypatch.setattr(data, "download", lambda name, kind: tmp_path / "snapshots" / revision[0])
    source = Registered(Params.model_validate({"data": {"source": "hub:org/rows@main"}}), tmp_path, tmp_path)
    source.known, source.judged_without = {}, {}
    first = source.collect([], None, {}, ())
    assert first.files == {"hub:org/rows@main": "a" * 40}
    assert source.pinned(first.files) == f"hub:org/rows@{'a' * 40}"
    source.known = {"v0.1.0": first.files}
    assert source.collect([version("v0.1.0")], version("v0.1.0"), {}, ()).new_files == []
    revision[0] = "b" * 40
    assert source.collect([version("v0.1.0")], version("v0.1.0"), {}, ()).new_files == ["hub:org/rows@main"]

    def gone(*_: str) -> Path:
        raise DownloadError("no network")

    monkeypatch.setattr(data, "download", gone)
    with pytest.raises(DataError, match="hub:org/rows@main: the download failed: no network"):
        source.collect([], None, {}, ())


def test_several_sources_are_refused(tmp_path: Path) -> None:
    params = Params.model_validate({"data": {"mixture": [{"source": "data/a.jsonl"}]}})
    with pytest.raises(DataError, match=r"data\.mixture has several sources, and a retraining needs one"):
        Source(params, tmp_path, tmp_path)


def test_text_files_are_rows_of_texts_alone(tmp_path: Path) -> None:
    (tmp_path / "data" / "rows").mkdir(parents=True)
    (tmp_path / "data" / "rows" / "one.txt").write_text("One.")
    for kind, names in (("chat", []), ("text", ["one.txt"])):
        params = Params.model_validate({"data": {"source": "data/rows", "kind": kind}})
        assert list(Source(params, tmp_path, tmp_path)._files()) == names


@pytest.mark.parametrize("place", ["absolute", "home", "link"])
@pytest.mark.parametrize("reason", ["excluded", "waiting"])
def test_no_file_outside_the_working_tree_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, reason: str
) -> None:
    rows, tree = tmp_path / "srv" / "rows", tmp_path / "tree"
    (rows / "feedback").mkdir(parents=True)
    names = ["feedback/b.jsonl", "mine.jsonl"]
    for name in names:
        (rows / name).write_text(f"{name}\n")
    (tree / "data").mkdir(parents=True)
    (tree / "data" / "rows").symlink_to(rows)
    monkeypatch.setattr(data, "Git", lambda _: None)
    monkeypatch.setattr(data, "check_source_is_tracked", lambda *_: None)
    monkeypatch.setenv("HOME", str(tmp_path))
    section = {"source": {"absolute": str(rows), "home": "~/srv/rows", "link": "data/rows"}[place]}

    def collected(untrusted_rows: str, excluded: dict[str, str]) -> Collected:
        params = Params.model_validate({"data": section, "retrain": {"untrusted_rows": untrusted_rows}})
        source = Registered(params, tmp_path, tree)
        source.known, source.judged_without = {}, {}
        return source.collect([], None, excluded, ())

    untouched = collected("train", {})
    assert sorted(untouched.files) == names, "a retraining may read them"
    why = {untouched.files["feedback/b.jsonl"]: "v0.1.0 was refused"} if reason == "excluded" else {}
    with pytest.raises(DataError, match=r"deletes nothing outside .*feedback/b\.jsonl.*below data/.*retrain\.incoming"):
        collected("train" if why else "wait", why)
    assert sorted(path.relative_to(rows).as_posix() for path in rows.rglob("*.jsonl")) == names
