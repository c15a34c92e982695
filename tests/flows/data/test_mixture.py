"""Exact counts of training rows of several sources, and what the report says about them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.data.mixture import mixed, mixture_counts, mixture_report
from flows.data.sources import read_examples
from flows.data.splits import Row
from flows.data.tokens import TextTokens
from flows.errors import DataError
from flows.params import Data


def mixture(*parts: dict[str, Any], train_rows: int | None = None, **options: Any) -> Data:
    named = [{"source": f"{'abc'[number]}.jsonl"} | part for number, part in enumerate(parts)]
    return Data.model_validate({"mixture": named, "train_rows": train_rows, **options})


@pytest.mark.parametrize(
    ("weights", "train_rows", "available", "counts"),
    [
        ((3, 1), 100, (1000, 1000), (75, 25)),
        ((3, 1), None, (90, 100), (90, 30)),  # a allows 120 rows, b 400
        ((3, 1), 100, (90, 10), (30, 10)),
        ((1, 1, 1), 100, (50, 50, 50), (34, 33, 33)),
        ((0.1, 0.3), None, (10, 30), (10, 30)),
        ((None, 2), 9, (100, 100), (3, 6)),
    ],
)
def test_counts_follow_weights_without_repetition(
    weights: tuple[float | None, ...], train_rows: int | None, available: tuple[int, ...], counts: tuple[int, ...]
) -> None:
    data = mixture(*({"weight": weight} for weight in weights), train_rows=train_rows)
    names = "abc"[: len(weights)]
    assert mixture_counts(data, dict(zip(names, available, strict=True))) == dict(zip(names, counts, strict=True))


def test_rows_are_exact_or_an_error() -> None:
    data = mixture({"rows": 5}, {"rows": 7})
    assert mixture_counts(data, {"a": 5, "b": 100}) == {"a": 5, "b": 7}
    with pytest.raises(DataError, match="b has 6 training rows, and 7 are needed"):
        mixture_counts(data, {"a": 5, "b": 6})


def test_a_source_without_rows_is_an_error() -> None:
    with pytest.raises(DataError, match="b has 0 training rows, and 1 are needed"):
        mixture_counts(mixture({}, {}), {"a": 5})
    with pytest.raises(DataError, match="of 10 training rows, b gets none"):
        mixture_counts(mixture({"weight": 99}, {"weight": 1}, train_rows=10), {"a": 500, "b": 500})


def test_the_same_rows_in_the_seeds_order() -> None:
    rows = [Row(TextTokens(f"{n}", [1], 0, "x"), f"{n}", "all", source="ab"[n % 2]) for n in range(40)]
    data = mixture({"weight": 3}, {"weight": 1}, train_rows=20)
    chosen = mixed(rows, data, 0)
    assert [sum(row.source == name for row in chosen) for name in "ab"] == [15, 5]
    assert chosen == mixed(rows[::-1], data, 0) != mixed(rows, data, 1)


def test_examples_name_their_source(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("a.jsonl", "b/c.jsonl"):
        (tmp_path / name).write_text(json.dumps({"prompt": name, "completion": "1.", "topic": "t"}) + "\n")
    data = Data.model_validate({"mixture": [{"source": "a.jsonl"}, {"source": "b", "name": "second"}]})
    examples = read_examples(data, tmp_path)
    told = [("a", "a/a.jsonl:1", "a"), ("second", "second/c.jsonl:1", "second")]
    assert [(one.source, one.where, one.slice) for one in examples] == told
    by_topic = data.model_copy(update={"slice_column": "topic"})
    assert {one.slice for one in read_examples(by_topic, tmp_path)} == {"t"}


def test_a_tracked_file_that_is_not_here_says_what_to_pull(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.dvc").write_text("outs: [{md5: abc, path: a.jsonl}]\n")
    with pytest.raises(DataError, match=r"run `dvc pull a\.jsonl`"):
        read_examples(Data(source="a.jsonl"), tmp_path)


@pytest.mark.slow
def test_the_version_of_a_dvc_import_is_reported(tmp_path: Path) -> None:
    def run(*command: str, at: str) -> str:
        (tmp_path / at).mkdir(exist_ok=True)
        return subprocess.run(command, cwd=tmp_path / at, check=True, capture_output=True, text=True).stdout.strip()

    dvc = str(Path(sys.executable).with_name("dvc"))
    for folder in ("there", "here"):
        run("git", "init", "--quiet", at=folder)
        run("git", "config", "user.email", "ada@example.org", at=folder)
        run("git", "config", "user.name", "Ada", at=folder)
        run(dvc, "init", "--quiet", at=folder)
    rows = json.dumps({"prompt": "One?", "completion": "1."}) + "\n"
    (tmp_path / "there" / "rows.jsonl").write_text(rows)
    run(dvc, "add", "--quiet", "rows.jsonl", at="there")
    run("git", "add", "--all", at="there")
    run("git", "commit", "--quiet", "--message=Rows", at="there")
    run(dvc, "import", "--quiet", str(tmp_path / "there"), "rows.jsonl", "--out", "shared.jsonl", at="here")
    data = Data.model_validate({"mixture": [{"source": "shared.jsonl"}]})
    examples = read_examples(data, tmp_path / "here")
    report = mixture_report(data, examples, [], {"train": []}, tmp_path / "here")
    commit = run("git", "rev-parse", "HEAD", at="there")
    assert report["shared"]["examples"] == 1
    assert report["shared"]["dvc"] | {"md5": ""} == {
        "md5": "",
        "url": str(tmp_path / "there"),
        "rev": commit,
        "path": "rows.jsonl",
    }
