"""prepare: three Parquet files and a report, the same bytes each time, or a clear error and the old ones."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from flows.errors import BaseModelError, DataError
from flows.params import Data, Params, Project, Train
from flows.paths import SPLITS, Paths, Split
from flows.stages.prepare import run

LIMITS: dict[str, Any] = {"train_rows": 30, "validation_rows": 4, "test_rows": 4}


@pytest.fixture
def paths(tmp_path: Path, tiny_base: Path) -> Paths:
    rows = [
        {"prompt": f"How much is {number} and 1?", "completion": f"{number + 1}.", "book": f"book{number // 4}"}
        for number in range(80)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Paths(tmp_path)


def params(seed: int = 42, **options: Any) -> Params:
    given = {"source": "rows.jsonl", "group_column": "book", "system_prompt": "Be brief.", **LIMITS, **options}
    objective = {"preference": "dpo", "classification": "classification"}.get(given.get("kind", "chat"), "sft")
    return Params(project=Project(seed=seed), data=Data(**given), train=Train.model_validate({"objective": objective}))


def split(paths: Paths, name: Split) -> list[dict[str, Any]]:
    import pyarrow.parquet as parquet

    return parquet.read_table(paths.split(name)).to_pylist()


def add_rows(paths: Paths, rows: list[dict[str, str]]) -> None:
    with (paths.root / "rows.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def contents(paths: Paths) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(paths.data.iterdir())}


def test_rows_hold_what_training_and_evaluation_need(paths: Paths) -> None:
    run(params(), paths)
    assert [len(split(paths, name)) for name in SPLITS] == [30, 4, 4]
    row = split(paths, "test")[0]
    assert row["labels"][: row["prompt_length"]] == [-100] * row["prompt_length"]
    assert row["labels"][row["prompt_length"] :] == row["input_ids"][row["prompt_length"] :]
    assert row["prompt"].startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow much is ")
    assert row["prompt"].endswith("<|im_start|>assistant\n")
    assert row["completion"][:-1].isdigit()
    assert (row["group"][:4], row["slice"], len(row["id"])) == ("book", "all", 16)


def test_the_columns_have_their_types(paths: Paths) -> None:
    import pyarrow.parquet as parquet

    run(params(), paths)
    types = {field.name: str(field.type) for field in parquet.read_schema(paths.split("train"))}
    assert types["input_ids"] == types["labels"] == "list<element: int32>"
    assert types["prompt_length"] == "int32"
    assert types["weight"] == "float"
    assert types["id"] == types["group"] == types["slice"] == types["prompt"] == types["completion"] == "string"


def test_two_runs_write_the_same_bytes_and_the_seed_others(paths: Paths) -> None:
    run(params(), paths)
    first = contents(paths)
    run(params(), paths)
    assert contents(paths) == first
    run(params(seed=1), paths)
    assert contents(paths)["train.parquet"] != first["train.parquet"]


def test_splits_share_no_group_and_no_prompt(paths: Paths) -> None:
    run(params(train_rows=None, validation_rows=None, test_rows=None), paths)
    for column in ("group", "prompt"):
        values = [{row[column] for row in split(paths, name)} for name in SPLITS]
        assert len(set.union(*values)) == sum(map(len, values))
    report = json.loads(paths.data_report.read_text())
    assert sum(report["splits"][name]["rows"] for name in SPLITS) == 80
    assert {count for pair in report["leakage"].values() for count in pair.values()} == {0}


def test_nothing_is_judged_by_unproven_files(paths: Paths) -> None:
    """Their rows that would be held out are left out, so that they can be held out once the file is proven."""
    folder = paths.root / "rows"
    folder.mkdir()
    for week, numbers in (("week1", range(80)), ("week2", range(80, 160))):
        rows = [{"prompt": f"How much is {n} and 1?", "completion": f"{n + 1}.", "book": f"b{n // 4}"} for n in numbers]
        (folder / f"{week}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    limits = dict.fromkeys(LIMITS)
    given = {"source": "rows", "assignment": "hashed", "validation_share": 0.3, "test_share": 0.3, **limits}
    found: dict[bool, dict[Split, set[str]]] = {}
    for unproven in (False, True):
        run(params(**given, quarantined=["week2.jsonl"] if unproven else None), paths)
        found[unproven] = {name: {row["group"] for row in split(paths, name)} for name in SPLITS}
    second = {f"b{number}" for number in range(20, 40)}
    assert found[True]["train"] == found[False]["train"] and found[True]["train"] & second
    held_out: tuple[Split, ...] = ("validation", "test")
    for name in held_out:
        assert found[False][name] & second, "the test needs held-out rows of both weeks"
        assert found[True][name] == found[False][name] - second
    dropped = json.loads(paths.data_report.read_text())["dropped"]
    groups = len((found[False]["validation"] | found[False]["test"]) & second)
    assert dropped == {"quarantined, so not used for evaluation": 4 * groups}


@pytest.mark.parametrize("kind", ["chat", "preference", "classification"])
def test_hashed_splits_stay_when_a_row_is_put_at_the_top(paths: Paths, kind: str) -> None:
    rows = {"chat": [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]}
    rows |= {"preference": PAIRS, "classification": TEXTS}
    new = {key: "Something new" if isinstance(value, str) else value for key, value in rows[kind][0].items()}
    new |= {"rejected": "no"} if kind == "preference" else {"label": "odd"} if kind == "classification" else {}
    limits = dict.fromkeys(LIMITS)
    given = {**OWN, **limits, "kind": kind, "assignment": "hashed", "validation_share": 0.2, "test_share": 0.3}
    found: list[dict[Split, set[str]]] = []
    for top in ([], [new]):
        write_source(paths, [*top, *rows[kind]])
        run(params(**given), paths)
        found.append({name: {row["id"] for row in split(paths, name)} for name in SPLITS})
    for name in SPLITS:
        assert found[0][name] <= found[1][name]
    assert sum(len(found[1][name]) - len(found[0][name]) for name in SPLITS) == 1


def test_any_python_has_docstrings_to_prepare(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    import json.decoder

    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(Path(json.decoder.__file__).parent)})
    run(params(source="stdlib:docstrings", group_column=None, max_length=1000, test_share=0.2), paths)
    assert "```python\ndef " in split(paths, "train")[0]["prompt"]


def test_overlong_rows_are_dropped_and_counted(paths: Paths) -> None:
    add_rows(paths, [{"prompt": "x" * 300, "completion": "y", "book": "z"}])
    run(params(max_length=150), paths)
    assert json.loads(paths.data_report.read_text())["dropped"] == {"longer than 150 tokens": 1}


def test_overlong_rows_are_truncated_and_counted(paths: Paths) -> None:
    long = [{"prompt": f"{i} " + "x" * 300, "completion": "y", "book": f"z{i}"} for i in range(40)]
    add_rows(paths, long)
    run(params(max_length=150, overlong="truncate", train_rows=None), paths)
    report = json.loads(paths.data_report.read_text())
    assert report["splits"]["train"]["truncated"] > 0
    assert report["splits"]["train"]["length"]["max"] == 150
    assert report["dropped"] == {}


def test_overlong_rows_can_be_an_error(paths: Paths) -> None:
    with pytest.raises(DataError, match=r"(?s)80 rows cannot be used.*rows\.jsonl:1: \d+ tokens, more than"):
        run(params(max_length=50, overlong="error"), paths)


def test_a_limit_beyond_the_context_is_refused(paths: Paths) -> None:
    with pytest.raises(DataError, match=r"data\.max_length: 1025 is more than the base's context of 1024 tokens"):
        run(params(max_length=1025), paths)


def test_nothing_left_says_what_was_dropped(paths: Paths) -> None:
    with pytest.raises(DataError, match="80 longer than 8 tokens"):
        run(params(max_length=8), paths)


def test_a_failure_leaves_the_old_data(paths: Paths) -> None:
    run(params(), paths)
    before = contents(paths)
    (paths.root / "rows.jsonl").write_text('{"prompt": "a", "completion": ""}\n')
    with pytest.raises(DataError, match="its completion is empty"):
        run(params(), paths)
    assert contents(paths) == before
    assert sorted(path.name for path in paths.artifacts.iterdir()) == ["base", "data"]


def test_a_full_disk_leaves_the_old_data(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    run(params(), paths)
    before = contents(paths)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Dataset, "to_parquet", full)
    with pytest.raises(OSError, match="No space left"):
        run(params(), paths)
    assert contents(paths) == before
    assert sorted(path.name for path in paths.artifacts.iterdir()) == ["base", "data"]


PAIRS = [
    {"prompt": f"Is {n} or {n * n + 1000} more?", "chosen": f"{n * n + 1000}.", "rejected": f"{n}.", "weight": n % 3}
    for n in range(60)
]
TEXTS = [{"text": f"Is {n} or {n * n + 1000} more?", "label": ("odd", "even")[n % 2]} for n in range(60)]
OWN: dict[str, Any] = {"group_column": None, "system_prompt": None}


def write_source(paths: Paths, rows: list[dict[str, Any]]) -> None:
    (paths.root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def types_of(paths: Paths) -> dict[str, str]:
    import pyarrow.parquet as parquet

    return {field.name: str(field.type) for field in parquet.read_schema(paths.split("test"))}


def test_preferences_share_their_prompts_tokens(paths: Paths) -> None:
    write_source(paths, PAIRS)
    run(params(kind="preference", **OWN), paths)
    for name in SPLITS:
        for row in split(paths, name):
            length = row["prompt_length"]
            assert row["chosen_input_ids"][:length] == row["rejected_input_ids"][:length]
            for side in ("chosen", "rejected"):
                assert row[f"{side}_labels"] == [-100] * length + row[f"{side}_input_ids"][length:]
            number = int(row["rejected"][:-1])
            assert (row["chosen"], row["weight"]) == (f"{number * number + 1000}.", number % 3)
            assert row["prompt"].endswith(
                f"Is {number} or {number * number + 1000} more?<|im_end|>\n<|im_start|>assistant\n"
            )
    types = types_of(paths)
    assert {types[f"{side}_{part}"] for side in ("chosen", "rejected") for part in ("input_ids", "labels")} == {
        "list<element: int32>"
    }
    assert types["weight"] == "float"


def test_long_preferences_lose_the_end_of_their_question(paths: Paths) -> None:
    long = {"prompt": "begin " + "x" * 300, "chosen": "yes", "rejected": "no, never"}
    write_source(paths, [*PAIRS, *({**long, "prompt": f"{n} {long['prompt']}"} for n in range(20))])
    run(params(kind="preference", overlong="truncate", max_length=150, **{**OWN, "train_rows": None}), paths)
    cut = [row for row in split(paths, "train") if row["rejected"] == "no, never"]
    assert {len(row["rejected_input_ids"]) for row in cut} == {150}
    assert {row["chosen"] for row in cut} == {"yes"}


def test_labelled_texts_have_numbers_for_their_classes(paths: Paths) -> None:
    write_source(paths, TEXTS)
    run(params(kind="classification", **OWN), paths)
    assert json.loads(paths.labels.read_text()) == ["even", "odd"]
    assert json.loads(paths.data_report.read_text())["labels"] == ["even", "odd"]
    for row in split(paths, "train"):
        assert row["label"] == ["even", "odd"].index(row["label_name"])
        assert (int(row["text"].split()[1]) % 2 == 1) == (row["label_name"] == "even")
    assert types_of(paths)["label"] == "int32"


def test_labels_that_are_numbers_keep_their_order(paths: Paths) -> None:
    write_source(paths, [row | {"label": 9 + n % 2} for n, row in enumerate(TEXTS)])
    run(params(kind="classification", **OWN), paths)
    assert json.loads(paths.labels.read_text()) == ["9", "10"]


def test_one_class_is_none(paths: Paths) -> None:
    write_source(paths, [row | {"label": "odd"} for row in TEXTS])
    with pytest.raises(DataError, match="all rows have the label 'odd'"):
        run(params(kind="classification", **OWN), paths)


@pytest.mark.parametrize("seed", range(3))
def test_near_duplicates_stay_in_test_and_are_dropped_elsewhere(paths: Paths, seed: int) -> None:
    text = " ".join(f"word{n}" for n in range(60))
    rows = [{"prompt": f"{row['prompt']} {n}", "completion": "a", "book": n} for n, row in enumerate(PAIRS)]
    twins = [{"prompt": f"{n} {text}", "completion": "a", "book": n} for n in range(12)]
    write_source(paths, [*rows, *twins])
    run(params(seed=seed, near_duplicates="keep", max_length=1000, train_rows=None, test_rows=None), paths)
    kept, before = json.loads(paths.data_report.read_text()), paths.split("test").read_bytes()
    leaking = [
        finding for finding in kept["doctor"]["findings"] if finding["check"] == "near-duplicates between splits"
    ]
    assert leaking[0]["severity"] == "error"
    run(params(seed=seed, max_length=1000, train_rows=None, test_rows=None), paths)
    report = json.loads(paths.data_report.read_text())
    assert report["dropped"]["near-duplicate of another split"] > 0
    assert paths.split("test").read_bytes() == before
    assert not [finding for finding in report["doctor"]["findings"] if finding["severity"] == "error"]


def test_without_a_base_the_stage_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="run `peftcore stage fetch` first"):
        run(params(), Paths(tmp_path))


def test_nothing_is_judged_by_rows_that_training_started_from_has_learned(paths: Paths) -> None:
    run(params(), paths)
    test, train = split(paths, "test"), split(paths, "train")
    paths.start.mkdir()
    paths.start_source.write_text(json.dumps({"version": "v0.1.0"}))
    learned = [*test[:2], train[0]]
    table = {"question": [row["prompt"] for row in learned], "answer": [row["completion"] for row in learned]}
    Dataset.from_dict(table).to_parquet(paths.start_learned)
    given = params(near_duplicates="keep")
    given = given.model_copy(update={"train": given.train.model_copy(update={"start_from": "v0.1.0"})})
    run(given, paths)
    prompts = {name: {row["prompt"] for row in split(paths, name)} for name in SPLITS}
    assert not prompts["test"] & set(table["question"]) and prompts["test"] & {row["prompt"] for row in test[2:]}
    assert train[0]["prompt"] in prompts["train"], "it may be trained on again"
    report = json.loads(paths.data_report.read_text())
    assert report["dropped"]["learned by the version that training starts from"] >= 2
    with pytest.raises(DataError, match=r"train\.start_from is null, but .* is of v0\.1\.0.*run the start stage"):
        run(params(), paths)


def test_further_columns_are_written_only_if_they_are_named(paths: Paths) -> None:
    rows = [{"prompt": row["prompt"], "completion": row["chosen"], "tests": row["prompt"][::-1]} for row in PAIRS]
    write_source(paths, rows)
    run(params(**OWN, kind="chat"), paths)
    before = split(paths, "test")
    run(params(**OWN, kind="chat", extra_columns=["tests"]), paths)
    after = split(paths, "test")
    assert [{name: value for name, value in row.items() if name != "extra"} for row in after] == before
    turned = {row["prompt"][::-1] for row in PAIRS}
    assert all(json.loads(row["extra"])["tests"] in turned for row in after)
